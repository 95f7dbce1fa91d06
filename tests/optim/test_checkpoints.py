"""Saved and loaded states of any optimizer are bit-identical, and a resumed run is the undisturbed one."""

import bitsandbytes
import pytest
import torch

from lowprec.errors import UserError
from lowprec.optim import AdamW, load_optimizer_states, save_optimizer_states
from tests.optim.training import make_model, same, train

MAKERS = {
    "lowprec": lambda p: AdamW(p, lr=1e-2, state_dtype="int8"),
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "torch fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "bnb 8 bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=1024),
    "bnb paged": lambda p: bitsandbytes.optim.PagedAdamW(p, lr=1e-2),
    "bnb paged 8 bit": lambda p: bitsandbytes.optim.PagedAdamW8bit(p, lr=1e-2, min_8bit_size=1024),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, make, dtype):
    model = make_model(dtype)
    expected = train(model, make(model.named_parameters()), 6)
    model = make_model(dtype)
    optimizer = make(model.named_parameters())
    train(model, optimizer, 3)
    save_optimizer_states(optimizer, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}
    again = make(model.named_parameters())
    again.param_groups[0]["lr"] = 5.0
    load_optimizer_states(again, tmp_path)
    assert again.param_groups[0]["lr"] == 1e-2
    for param in model.parameters():
        before, after = optimizer.state[param], again.state[param]
        assert before.keys() == after.keys()
        for key, value in before.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
            else:
                assert value == after[key]
    assert same(train(model, again, 6, start=3), expected)


def test_states_of_another_optimizer_or_model_are_refused(tmp_path):
    model = make_model()
    optimizer = MAKERS["bnb 8 bit"](model.named_parameters())
    train(model, optimizer, 1)
    save_optimizer_states(optimizer, tmp_path / "bnb")
    with pytest.raises(UserError, match="states of AdamW8bit, but this run uses SGD"):
        load_optimizer_states(MAKERS["sgd"](model.named_parameters()), tmp_path / "bnb")
    with pytest.raises(UserError, match="other parameters"):
        load_optimizer_states(MAKERS["bnb 8 bit"](list(model.named_parameters())[:-1]), tmp_path / "bnb")
    with pytest.raises(UserError, match="no complete optimizer states"):
        load_optimizer_states(optimizer, tmp_path / "nothing")


def test_lowprec_states_of_another_run_are_refused(tmp_path):
    model = make_model(torch.bfloat16)
    optimizer = AdamW(model.named_parameters())
    train(model, optimizer, 1)
    optimizer.save_states(tmp_path)
    with pytest.raises(UserError, match="1 are not in this run, the first 4.bias"):
        AdamW(list(model.named_parameters())[:-1]).load_states(tmp_path)
    with pytest.raises(UserError, match="optimizer.master of the saved run"):
        AdamW(model.named_parameters(), master="fp32").load_states(tmp_path)
    (tmp_path / "optimizer.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        AdamW(model.named_parameters()).load_states(tmp_path)
    (tmp_path / "optimizer.json").write_text('{"version": 9}')
    with pytest.raises(UserError, match="version 9"):
        AdamW(model.named_parameters()).load_states(tmp_path)


def test_states_saved_before_the_first_step_resume_as_new(tmp_path):
    model = make_model()
    AdamW(model.named_parameters(), lr=1e-2).save_states(tmp_path)
    again = AdamW(model.named_parameters(), lr=1.0)
    again.load_states(tmp_path)
    assert again.param_groups[0]["lr"] == 1e-2 and again.state_dict()["state"] == {}
