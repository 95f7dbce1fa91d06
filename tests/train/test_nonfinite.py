"""A NaN stops the run at its step, names the layer, and does not reach the weights."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from lowprec.activations import keep_activations
from lowprec.data import StepBatch
from lowprec.model import Model, load_model, load_tokenizer
from lowprec.optim import AdamW
from lowprec.run_folder import read_metrics, read_report
from lowprec.testing import save_tiny, tiny_model, tiny_tokenizer
from lowprec.train.nonfinite import NonFiniteError, find_origin
from lowprec.train.state import random_state
from tests.train.conftest import run


@pytest.fixture
def poisoned(tmp_path, tiny):
    """A model whose embedding of the token ``#`` is infinite, which one training sample holds."""
    folder = save_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tiny_tokenizer().convert_tokens_to_ids("#")] *= float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lines = (tiny / "chats.jsonl").read_text().splitlines()
    sample = json.loads(lines[7])
    sample["messages"][1]["content"] = "# " + sample["messages"][1]["content"]
    data = tmp_path / "poisoned.jsonl"
    data.write_text("\n".join([*lines[:7], json.dumps(sample), *lines[8:]]))
    return [f'model.model_name_or_path="{folder}"', f'data.path="{data}"']


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_stops_at_the_step_names_the_layer_and_the_last_checkpoint(optimizer, poisoned, arguments, tmp_path):
    more = ("train.save_steps=1", "train.max_steps=30", "train.save_total_limit=null", f"optimizer={optimizer}")
    with pytest.raises(NonFiniteError) as error:
        run("full", arguments(*poisoned, *more))
    report, rows = read_report(tmp_path / "run"), read_metrics(tmp_path / "run")
    bad_step = report["steps"] + 1
    assert f"Step {bad_step} is not finite" in str(error.value)
    assert "forward of model.embed_tokens" in str(error.value)
    assert all(row["step"] < bad_step for row in rows)
    assert report["status"] == "failed" and "NonFiniteError" in report["error"]
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda p: int(p.name[5:]))
    if checkpoints:
        assert checkpoints[-1].name == f"step-{bad_step - 1}" and str(checkpoints[-1]) in str(error.value)
        for checkpoint in checkpoints:
            weights = load_file(checkpoint / "trainable.safetensors").values()
            assert not any(torch.isnan(tensor).any() for tensor in weights)  # the poison itself is an infinity
    else:
        assert bad_step == 1


def test_updates_in_backward_are_told_to_have_begun(poisoned, arguments):
    keys = ("train.max_steps=30", "train.max_grad_norm=null", "train.gradient_accumulation_steps=1")
    with pytest.raises(NonFiniteError, match="Weights whose gradients came before it .* were updated"):
        run("full", arguments(*poisoned, *keys))


def test_no_checkpoint_yet_is_said(poisoned, arguments):
    with pytest.raises(NonFiniteError, match=r"none, train\.save_steps was not reached"):
        run("full", arguments(*poisoned, "train.max_steps=30"))


def test_an_overflow_deep_in_the_model_is_located(arguments, tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = load_tokenizer(Model(model_name_or_path=str(folder)))
    model = load_model(Model(model_name_or_path=str(folder), dtype="fp32"))
    ids = torch.tensor([tokenizer("some words").input_ids])
    origin = find_origin(model, _batch(ids), random_state(), Accelerator(cpu=True))
    assert origin in ("forward of model.layers.1.mlp.up_proj", "forward of model.layers.1.mlp.down_proj")


def test_a_gradient_that_overflows_is_located():
    """Forward is finite (sqrt of zero), its derivative there is not."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 5)
            torch.nn.init.zeros_(self.body.weight)
            torch.nn.init.zeros_(self.body.bias)

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.head(self.body(torch.ones(*input_ids.shape, 4)).abs().sqrt()))

    ids = torch.tensor([[0, 1, 2]])
    assert find_origin(Model(), _batch(ids), random_state(), Accelerator(cpu=True)) == "gradient of the output of body"


def test_a_parameter_s_gradient_is_located_once_the_optimizer_takes_none_in_backward():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(5))

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.w.abs().sqrt().expand(*input_ids.shape, 5))

    model = Model()
    optimizer = AdamW(model.named_parameters())
    optimizer.update_in_backward()
    optimizer.stop_updates_in_backward()
    found = find_origin(model, _batch(torch.tensor([[0, 1, 2]])), random_state(), Accelerator(cpu=True))
    assert found == "gradient of w"


class _OverflowsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_a_gradient_is_located_in_layers_that_backward_computes_again(policy):
    """The layers below the bad one are computed again when the origin is known: they must keep the same tensors."""
    model = tiny_model("llama")
    keep_activations(model, policy, "of the test")
    model.train()
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: _OverflowsInBackward.apply(output))
    origin = find_origin(model, _batch(torch.tensor([[5, 6, 7]])), random_state(), Accelerator(cpu=True))
    assert origin == "gradient of the output of model.layers.1.mlp.down_proj"


def _batch(ids):
    counts = {"num_trained_tokens": 2, "num_trained_tokens_global": 2, "num_tokens": 3, "num_tokens_global": 3}
    return StepBatch(micro_batches=[{"input_ids": ids, "labels": ids}], num_padding=0, epoch=0.0, state={}, **counts)
