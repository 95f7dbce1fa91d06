"""The loss inside ``forward``: the plain path's numbers for every head, through every wrapper, without the logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lowprec.attention import attend_without_masks
from lowprec.data.collate import collate, shifted, trained_positions
from lowprec.fused.loss_head import gives_loss, put_loss
from lowprec.prepare import wrap
from lowprec.testing import ARCHITECTURES, VOCAB_SIZE, sqnr_db, tiny_model
from lowprec.train.step import loss_sum
from tests.fused.test_fuse import OTHERS, model_of
from tests.fused.test_linear_cross_entropy import Largest


def batch(lengths=(5, 17, 9), trained_from=3):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(2, 256, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * trained_from + ids[trained_from:], "lengths": [length]})
    return collate(rows, pad_token_id=0, attention=None)


def loss_and_gradients(model, scale=1.0):
    model.zero_grad()
    loss = loss_sum(model, batch())
    (loss * scale).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    mine, theirs = (
        torch.cat([gradients[name].flatten() for name in found[1]]) for gradients in (found[1], expected[1])
    )
    assert sqnr_db(theirs, mine) > 90


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *OTHERS, "qwen3_moe"])
def test_the_numbers_of_the_plain_path(arch, monkeypatch):
    if arch == "qwen3_moe":
        monkeypatch.setitem(OTHERS, arch, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32})
    model = model_of(arch)
    expected = loss_and_gradients(model)
    assert put_loss(model) is None and gives_loss(model)
    assert_same(loss_and_gradients(model), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["frozen head", "LoRA on the head", "a copy of the head"],
)
def test_under_peft(fields):
    results = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = tiny_model("llama")
        assert not chunked or put_loss(model) is None
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **fields))
        assert gives_loss(model) is chunked
        results.append(loss_and_gradients(model, scale=1024.0))
    assert_same(results[1], results[0])
    assert any("lm_head" in name for name in results[1][1]) is (fields["target_modules"] != "all-linear")


def test_a_head_in_8_bits():
    """Its chunks go through the layer itself."""
    model = tiny_model("llama")
    report = wrap(model, "int8_hadamard", rules={"lm_head": "int8_hadamard"})
    assert report.counts() == {"int8_hadamard": 15} and gives_loss(model)
    found = loss_and_gradients(model)
    inputs = batch()
    logits = type(model).forward(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    flat = logits.flatten(0, 1)
    expected = nn.functional.cross_entropy(flat, shifted(inputs["labels"]), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-5, atol=0)
    assert found[1]["lm_head.weight"].abs().sum() > 0


def test_tied_embeddings():
    model = tiny_model("gemma")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    expected = loss_and_gradients(model)
    put_loss(model)
    assert_same(loss_and_gradients(model), expected)


def test_only_trained_tokens_reach_the_head():
    inputs = batch(lengths=(500, 512), trained_from=490)
    trained = int((shifted(inputs["labels"]) != -100).sum())
    assert trained == 32 and inputs["labels"].numel() == 1024
    for chunked in (True, False):
        model = tiny_model("llama")
        attend_without_masks(model)
        if chunked:
            put_loss(model)
        for grad in (True, False):
            with Largest() as largest, torch.set_grad_enabled(grad):
                loss = loss_sum(model, inputs)
                if grad:
                    loss.backward()
            assert largest.numel == 1024 * (128 if chunked else VOCAB_SIZE)  # 128: the MLP's inner width


def test_positions_may_come_with_the_batch_or_not():
    model = tiny_model("llama")
    put_loss(model)
    inputs = batch()
    positions = trained_positions(inputs["labels"])
    assert positions.tolist() == [i for i, label in enumerate(shifted(inputs["labels"])) if label != -100]
    assert torch.equal(loss_sum(model, inputs | {"trained_positions": positions}), loss_sum(model, inputs))


def test_other_callers_get_transformers_own_forward():
    plain, model = tiny_model("llama"), tiny_model("llama")
    put_loss(model)
    inputs = batch()
    expected, found = plain(**inputs), model(**inputs)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)
    assert found.logits.shape[-1] == VOCAB_SIZE
    assert put_loss(model) is None  # a second time is no harm


def test_unknown_changes_of_the_logits_keep_the_plain_path():
    class Odd(type(tiny_model("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.sin()
            return output

    model = tiny_model("llama")
    model.__class__ = Odd
    assert "changed after the head" in put_loss(model) and not gives_loss(model)
    assert loss_sum(model, batch()).isfinite()


def test_autocast_and_half_precision():
    """As Accelerate runs it: bf16 weights under autocast; the loss stays fp32 and near that of fp32."""
    exact = loss_sum(tiny_model("llama"), batch())
    model = tiny_model("llama", dtype=torch.bfloat16)
    put_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_sum(model, batch())
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isclose(loss, exact, rtol=1e-2)
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
