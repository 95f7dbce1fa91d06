"""Attention without masks gives the numbers of attention with them, wherever it is taken."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from lowprec.attention import CAUSAL_SDPA, attend_without_masks, attention, mask_note, why_no_flash
from lowprec.data.collate import collate
from lowprec.data.documents import Documents
from lowprec.data.rows import PackedAttention
from lowprec.testing import ARCHITECTURES, VOCAB_SIZE, sqnr_db, tiny_model
from lowprec.train.step import loss_sum
from tests.fused.test_fuse import SHAPE
from tests.fused.test_linear_cross_entropy import Largest


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


WINDOWED = [
    ("mistral", {"sliding_window": 8}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("gemma3_text", {"sliding_window": 8, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    ("phi3", {"sliding_window": 8}),
]


def windowed(arch, fields):
    torch.manual_seed(0)
    if arch in ARCHITECTURES:
        model = tiny_model(arch, use_cache=False, **fields)
    else:
        config = AutoConfig.for_model(arch, **SHAPE | {"pad_token_id": None, "use_cache": False} | fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)  # random weights of std 0.02 hardly attend
    return model


@pytest.mark.parametrize(("arch", "fields"), WINDOWED, ids=[arch for arch, _ in WINDOWED])
@pytest.mark.parametrize("is_packed", [False, True])
def test_windows_give_what_masks_give(arch, fields, is_packed):
    """Samples of 5 to 37 tokens, windows of 8."""
    if is_packed:
        inputs = collate(
            [packed([9, 1, 37]), packed([8, 17, 11])], pad_token_id=256, attention=PackedAttention.POSITIONS
        )
        given = collate(
            [packed([9, 1, 37]), packed([8, 17, 11])], pad_token_id=256, attention=PackedAttention.DOCUMENTS
        )
    else:
        inputs = given = collate(rows([5, 37, 16]), pad_token_id=256, attention=None)
    plain, model = windowed(arch, fields), windowed(arch, fields)
    assert attend_without_masks(model) and model.config._attn_implementation == CAUSAL_SDPA
    unbounded = windowed(arch, fields | {"sliding_window": 64})
    results = []
    for one, batch in ((plain, inputs), (model, given), (unbounded, inputs)):
        loss = loss_sum(one, batch)
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None])))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    assert sqnr_db(results[0][1], results[1][1]) > 80
    assert sqnr_db(results[0][1], results[2][1]) < 30  # the window hides something


def test_generation_in_a_window_goes_on_as_before():
    plain, skipping = windowed("mistral", {"sliding_window": 8}), windowed("mistral", {"sliding_window": 8})
    attend_without_masks(skipping)
    ids = torch.arange(3, 23)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 256,
               "use_cache": True}  # fmt: skip
    assert torch.equal(plain.generate(ids, **options), skipping.generate(ids, **options))


def test_no_mask_is_longer_than_two_windows():
    model = windowed("mistral", {"sliding_window": 8})
    attend_without_masks(model)
    with Largest() as largest:
        loss_sum(model, collate(rows([512]), pad_token_id=256, attention=None))
    assert largest.numel == 512 * VOCAB_SIZE  # the logits; a mask would be 512 x 512


def test_other_implementations_keep_their_masks():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert not attend_without_masks(model) and model.config._attn_implementation == "eager"


def test_long_rows_with_masks_are_told():
    model = tiny_model("mistral", sliding_window=4000, attn_implementation="eager")
    assert mask_note(model, 4096) is None
    note = mask_note(model, 8192)
    assert "8192 x 8192" in note and "64 MiB" in note and "up to 4000 tokens" in note
    model.set_attn_implementation("sdpa")
    attend_without_masks(model)
    assert mask_note(model, 8192) is None


def packed(lengths):
    items = rows(lengths)
    joined = [token for item in items for token in item["input_ids"]]
    labels = [-100 if i == 0 else label for item in items for i, label in enumerate(item["labels"])]
    return {"input_ids": joined, "labels": labels, "lengths": lengths}


BATCH = [packed([9, 1, 14]), packed([5]), packed([8, 17, 11])]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "opt"])
def test_lengths_give_the_gradients_that_masks_give(arch):
    results = []
    for cut in (PackedAttention.BOOL_MASK, PackedAttention.DOCUMENTS):
        model = tiny_model(arch, use_cache=False)
        if cut is PackedAttention.DOCUMENTS:
            assert attend_without_masks(model)
        loss = loss_sum(model, collate(BATCH, pad_token_id=256, attention=cut))
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (expected, gradient), (loss, mine) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert sqnr_db(gradient, mine) > 90


def test_no_mask_is_as_long_as_it_is_wide():
    """2 x 256 tokens: scores of whole rows, or a mask, would be 256 x 256 each."""
    model = tiny_model("llama", use_cache=False)
    attend_without_masks(model)
    samples = [packed([32] * 8), packed([32] * 8)]
    with Squares() as squares:
        loss_sum(model, collate(samples, pad_token_id=256, attention=PackedAttention.DOCUMENTS)).backward()
    assert squares.found == 0
    with Squares() as squares:
        loss_sum(model, collate(samples, pad_token_id=256, attention=PackedAttention.BOOL_MASK)).backward()
    assert squares.found > 0


class Squares(TorchDispatchMode):
    """Counts results whose last two dimensions are both 256."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found += sum(isinstance(t, torch.Tensor) and t.shape[-2:] == (256, 256) for t in tree_iter((args, result)))
        return result


def test_autocast_brings_operands_of_different_dtypes_together():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    documents = Documents.of([4, 5])
    exact = attention(None, q, k, v, None, documents=documents)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(None, q, k.bfloat16(), v.bfloat16(), None, documents=documents)[0]
    assert found.dtype == torch.bfloat16 and sqnr_db(exact, found) > 35


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("heads", [4, 2])
def test_flash_attention_takes_many_lengths_and_windows(heads, is_packed, window):
    """Against each sample alone in fp64, with the noise of bf16; and nothing waits for the device."""
    documents = Documents.of([300, 1, 57, 154, 512]).to("cuda") if is_packed else None
    options = {"scaling": 0.125, "documents": documents, "sliding_window": window}
    if window is None and not is_packed:
        pytest.skip("transformers' own SDPA")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, n, 512, 64, device="cuda", generator=generator, dtype=torch.bfloat16, requires_grad=True)
        for n in (4, heads, heads)
    )
    error = torch.randn(2, 512, 4, 64, device="cuda", generator=generator, dtype=torch.bfloat16)
    assert why_no_flash(q) is None
    attention(None, q, k, v, None, **options)[0].sum().backward()  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention(None, q, k, v, None, **options)[0]
        found = (out, *torch.autograd.grad(out, (q, k, v), error))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact_out = attention(None, *wide, None, **options)[0]  # one by one: fp64 has no flash
    exact = (exact_out, *torch.autograd.grad(exact_out, wide, error.double()))
    assert all(sqnr_db(theirs, mine) > 40 for mine, theirs in zip(found, exact, strict=True))
