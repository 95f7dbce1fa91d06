"""Attention without masks gives the numbers of attention with them, wherever it is taken."""

import pytest
import torch

from lowprec.attention import CAUSAL_SDPA, attend_without_masks
from lowprec.data.collate import collate
from lowprec.testing import ARCHITECTURES, tiny_model
from lowprec.train.step import loss_sum


def rows(lengths):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row, "lengths": [len(row)]} for row in ids]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padded_batch_gives_the_same_loss_and_gradients(arch):
    inputs = collate(rows([5, 17, 9]), pad_token_id=256, attention=None)
    results = []
    for skip in (False, True):
        model = tiny_model(arch, sliding_window=None) if arch == "mistral" else tiny_model(arch)
        if skip:
            assert attend_without_masks(model)
        loss = loss_sum(model, inputs)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (loss, gradients), (expected_loss, expected) = results[1], results[0]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_sample_s_loss_does_not_depend_on_its_padding():
    model = tiny_model("llama")
    attend_without_masks(model)
    alone = [loss_sum(model, collate([row], pad_token_id=256, attention=None)) for row in rows([5, 17, 9])]
    together = loss_sum(model, collate(rows([5, 17, 9]), pad_token_id=256, attention=None))
    torch.testing.assert_close(sum(alone), together, rtol=1e-6, atol=0)


def test_generation_continues_from_the_cache_as_before():
    plain, skipping = tiny_model("llama"), tiny_model("llama")
    attend_without_masks(skipping)
    ids = torch.tensor([[3, 4, 5, 6]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    assert torch.equal(plain.generate(ids, **options), skipping.generate(ids, **options))


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("llama", {"attn_implementation": "eager"}),
    ],
)
def test_windows_and_other_implementations_keep_their_masks(arch, fields):
    model = tiny_model(arch, **fields)
    if "attn_implementation" in fields:
        model.set_attn_implementation("eager")
    before = model.config._attn_implementation
    assert not attend_without_masks(model)
    assert model.config._attn_implementation == before != CAUSAL_SDPA
