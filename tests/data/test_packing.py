"""Rows are full, whole, and hold samples that do not see each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowprec.attention import attend_without_masks
from lowprec.data.chat import IGNORE
from lowprec.data.collate import collate
from lowprec.data.fit import packed_attention
from lowprec.data.packing import pack
from lowprec.data.rows import Item, PackedAttention
from lowprec.data.samples import join, to_item
from lowprec.errors import UserError
from lowprec.testing import ARCHITECTURES, tiny_model


@given(st.integers(1, 60).flatmap(lambda m: st.tuples(st.lists(st.integers(1, m), max_size=80), st.just(m))))
def test_every_sample_is_in_one_row_that_holds_it(case: tuple[list[int], int]) -> None:
    lengths, max_length = case
    rows = pack(lengths, max_length)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    totals = [sum(lengths[position] for position in row) for row in rows]
    assert all(0 < total <= max_length for total in totals)
    # No two rows fit into one, which best-fit guarantees and which bounds the waste.
    assert len(totals) < 2 or sum(sorted(totals)[:2]) > max_length
    assert rows == pack(lengths, max_length)


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 2000)
    rows = pack(lengths.tolist(), 1024)
    assert lengths.sum() / (len(rows) * 1024) > 0.99


def samples(seed: int, lengths: list[int]) -> list[Item]:
    random = np.random.default_rng(seed)
    items: list[Item] = []
    for length in lengths:
        ids = random.integers(1, 250, length).tolist()
        labels = [IGNORE, *np.where(random.random(length - 1) < 0.7, ids[1:], IGNORE).tolist()]
        items.append(to_item(ids, labels))
    return items


def losses(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of each position, ``[rows, length - 1]``, 0 where nothing is trained."""
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )


WINDOWED = {
    "mistral": {"sliding_window": 6},
    "qwen3": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "lengths"])
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [*((name, {}) for name in ARCHITECTURES), *WINDOWED.items()],
    ids=[*ARCHITECTURES, *(f"{name}-window" for name in WINDOWED)],
)
@torch.no_grad()
def test_a_packed_batch_gives_each_sample_the_loss_it_has_alone(
    architecture: str, overrides: dict, implementation: str
) -> None:
    named = "sdpa" if implementation == "lengths" else implementation
    model = tiny_model(architecture, attn_implementation=named, use_cache=False, **overrides)
    maskless = implementation == "lengths" and attend_without_masks(model)
    assert maskless is (implementation == "lengths")
    # Random weights of std 0.02 hardly attend; larger ones make a leak show.
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.mul_(4)
    items = samples(1, [9, 1, 14, 5, 8, 17, 11])
    rows = [join(items[:3]), join(items[3:4]), join(items[4:])]
    attention = packed_attention(model)
    packed = losses(model, collate(rows, 0, attention=attention))
    if maskless:
        assert attention is PackedAttention.DOCUMENTS
    elif architecture != "opt":  # it builds its mask without position_ids
        assert attention is PackedAttention.POSITIONS
    row, start = 0, 0
    for item in items:
        if start == len(rows[row]["input_ids"]):
            row, start = row + 1, 0
        end = start + len(item["input_ids"])
        alone = losses(model, collate([item], 0, attention=None))[0]
        torch.testing.assert_close(packed[row, start : end - 1], alone, rtol=2e-5, atol=2e-5)
        if end < len(rows[row]["input_ids"]):
            assert packed[row, end - 1] == 0  # nothing is predicted across the border
        start = end
    uncut = losses(model, collate([{**rows[0], "lengths": [24]}], 0, attention=PackedAttention.POSITIONS))[0]
    assert (uncut[10:23] - packed[0, 10:23]).abs().max() > 1e-2  # the bound above would see a leak


def test_a_model_that_cannot_be_cut_is_refused() -> None:
    """Mamba carries its state from one sample to the next whatever the mask says."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=272, hidden_size=32, num_hidden_layers=1, state_size=8, use_cache=False)
    )
    with pytest.raises(UserError, match=r"data\.packing=false"):
        packed_attention(model)
    assert model.training  # left as it was


def test_collate_of_nothing_is_one_row_of_padding() -> None:
    inputs = collate([], 7, attention=None)
    assert inputs["input_ids"].tolist() == [[7, 7]]
    assert inputs["labels"].tolist() == [[IGNORE, IGNORE]]
    assert inputs["attention_mask"].tolist() == [[1, 1]]
    model = tiny_model("llama")
    assert torch.isfinite(model(**{k: v for k, v in inputs.items() if k != "labels"}).logits).all()


def test_position_ids_restart_with_each_sample_and_with_the_padding() -> None:
    rows = [join(samples(0, [3, 2])), join(samples(1, [1]))]
    inputs = collate(rows, 0, attention=PackedAttention.POSITIONS)
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert "attention_mask" not in inputs
