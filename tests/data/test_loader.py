"""The same effective batches however they are divided, exact resuming, exact counts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.data import PreparedData, eval_batches
from lowprec.data.chat import IGNORE
from lowprec.data.loader import divide
from lowprec.data.options import Data
from lowprec.errors import UserError

Prepare = Callable[..., PreparedData]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_dividing_loses_and_repeats_nothing(number: int, batch: int, world: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 100, number)
    dealt = divide(np.arange(number), lengths, batch, world)
    assert sorted(int(i) for micro in dealt for part in micro for i in part) == list(range(number))
    assert all(len(micro) == world and max(map(len, micro)) <= batch for micro in dealt)
    assert len(dealt) == -(-number // (batch * world))
    order = [lengths[i] for micro in dealt for part in micro for i in part]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("packing", [False, True])
def test_every_row_once_an_epoch_in_another_order_each(steps: Any, prepared: Prepare, packing: bool) -> None:
    data = prepared(packing=packing, max_length=256)
    one = steps.loader(data, 2, 2)
    assert one.steps_per_epoch is not None
    batches = steps.take(one, 2 * one.steps_per_epoch)
    first, second = batches[: one.steps_per_epoch], batches[one.steps_per_epoch :]
    everything = sorted(tuple(data.train[i]["input_ids"]) for i in range(len(data.train)))
    for epoch in (first, second):
        ids = [tuple(r[r != 256].tolist()) for b in epoch for m in b.micro_batches for r in m["input_ids"]]
        assert sorted(ids) == everything
    assert not all(steps.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[-1].epoch == 1.0 and second[-1].epoch == 2.0


@pytest.mark.parametrize(("batch", "micro", "world"), [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_an_effective_batch_is_the_same_however_divided(
    steps: Any, prepared: Prepare, batch: int, micro: int, world: int
) -> None:
    data = prepared(number=38)  # 36 to train on after the split, and 2 epochs end with whole and with smaller steps
    reference = steps.take(steps.loader(data, 2, 2), 23)
    parts = [steps.take(steps.loader(data, batch, micro, rank, world), 23) for rank in range(world)]
    for step, expected in enumerate(reference):
        mine = [part[step] for part in parts]
        assert steps.rows(mine) == steps.rows([expected])
        assert {b.num_trained_tokens_global for b in mine} == {expected.num_trained_tokens_global}
        assert sum(b.num_trained_tokens for b in mine) == expected.num_trained_tokens
        assert sum(b.num_tokens for b in mine) == expected.num_tokens == expected.num_tokens_global
        assert len({len(b.micro_batches) for b in mine}) == 1
        assert [b.state for b in mine] == [expected.state] * world


def test_processes_without_a_row_take_part(steps: Any, prepared: Prepare) -> None:
    data = prepared(number=21)  # 20 to train on: steps of 8, 8 and 4 rows over 8 processes
    last = [steps.take(steps.loader(data, 1, 1, rank, 8), 3)[-1] for rank in range(8)]
    assert [len(batch.micro_batches) for batch in last] == [1] * 8
    idle = [batch for batch in last if batch.num_tokens == 0]
    assert len(idle) == 4
    assert all((b.micro_batches[0]["labels"] == IGNORE).all() and b.num_trained_tokens == 0 for b in idle)


@pytest.mark.parametrize("packing", [False, True])
def test_counts_are_those_of_the_tensors(steps: Any, prepared: Prepare, packing: bool) -> None:
    for batch in steps.take(steps.loader(prepared(packing=packing, max_length=256), 3, 2), 12):
        labels = [inputs["labels"] for inputs in batch.micro_batches]
        ids = [inputs["input_ids"] for inputs in batch.micro_batches]
        assert batch.num_trained_tokens == sum(int((label[:, 1:] != IGNORE).sum()) for label in labels)
        assert batch.num_tokens == sum(int((i != 256).sum()) for i in ids)
        assert batch.num_padding == sum(int((i == 256).sum()) for i in ids)


def test_padding_share_is_what_an_epoch_holds(steps: Any, prepared: Prepare) -> None:
    one = steps.loader(prepared(), 4, 2)
    batches = steps.take(one, one.steps_per_epoch or 0)
    padding, tokens = sum(b.num_padding for b in batches), sum(b.num_tokens for b in batches)
    assert one.padding_share == padding / (padding + tokens)
    rows = sum(len(inputs["input_ids"]) for batch in batches for inputs in batch.micro_batches)
    assert one.mean_row_length == pytest.approx((padding + tokens) / rows)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_padded_to_a_multiple_come_in_few_lengths(steps: Any, prepared: Prepare, packing: bool) -> None:
    data = prepared(packing=packing, max_length=250)
    plain, padded = steps.loader(data, 4, 2), steps.loader(data, 4, 2, pad_to_multiple_of=100)
    batches = steps.take(padded, padded.steps_per_epoch or 0)
    for one, other in zip(steps.take(plain, len(batches)), batches, strict=True):
        assert one.num_tokens == other.num_tokens and one.num_trained_tokens == other.num_trained_tokens
        for few, more in zip(one.micro_batches, other.micro_batches, strict=True):
            longest = few["input_ids"].shape[1]
            assert more["input_ids"].shape[1] == min(-(-longest // 100) * 100, 250), "never beyond max_length"
            assert (more["input_ids"][:, :longest] == few["input_ids"]).all()
            assert (more["labels"][:, longest:] == IGNORE).all()
            assert packing or (more["attention_mask"][:, longest:] == 0).all()
    share = sum(b.num_padding for b in batches) / sum(b.num_padding + b.num_tokens for b in batches)
    assert padded.padding_share == pytest.approx(share)


def test_what_rows_are_padded_to() -> None:
    data = Data(path="x", max_length=100)
    assert data.padding(few_shapes=False) == 1 and data.padding(few_shapes=True) == 13
    assert Data(path="x", max_length=100, packing=True).padding(few_shapes=True) == 100
    assert Data(path="x", pad_to_multiple_of=64).padding(few_shapes=True) == 64
    with pytest.raises(UserError, match=r"data\.pad_to_multiple_of"):
        Data(path="x", pad_to_multiple_of=0)


@pytest.mark.parametrize("stop", [0, 1, 7, 9, 10, 17])
def test_resuming_gives_the_same_remaining_batches(steps: Any, prepared: Prepare, stop: int) -> None:
    data = prepared(number=42)
    undisturbed = steps.take(steps.loader(data, 2, 2), 25)
    first = steps.loader(data, 2, 2)
    steps.take(first, stop)
    state = first.state_dict()
    resumed = steps.loader(data, 2, 2)
    resumed.load_state_dict(state)
    assert all(map(steps.equal, undisturbed[stop:], steps.take(resumed, 25 - stop)))
    if stop:
        assert state == undisturbed[stop - 1].state


def test_resuming_with_another_division_goes_on_at_the_same_row(steps: Any, prepared: Prepare) -> None:
    data = prepared(number=42)
    first = steps.loader(data, 2, 2)
    steps.take(first, 4)
    resumed = steps.loader(data, 1, 4, seed=3)
    resumed.load_state_dict(first.state_dict())
    assert steps.rows(steps.take(resumed, 1)) == steps.rows(steps.take(first, 1))


def test_resuming_with_other_data_is_refused(steps: Any, prepared: Prepare) -> None:
    state = steps.loader(prepared(), 2, 2).state_dict()
    for other in ({"number": 41}, {"packing": True}, {"eval_fraction": 0.2}, {"train_on_prompt": True}):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            steps.loader(prepared(**other), 2, 2).load_state_dict(state)
    with pytest.raises(UserError, match=r"train\.seed=3, .* train\.seed=4"):
        steps.loader(prepared(), 2, 2, seed=4).load_state_dict(state)
    steps.loader(prepared(), 1, 1).load_state_dict(state)


def test_num_steps(steps: Any, prepared: Prepare) -> None:
    one = steps.loader(prepared(number=42), 4, 1)  # 40 rows
    assert (one.num_steps(1), one.num_steps(2.5), one.num_steps(0.01)) == (10, 25, 1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_row_once(prepared: Prepare, world: int) -> None:
    data = prepared(number=60, eval_fraction=0.2)
    every = [
        list(eval_batches(data.evaluation, batch_size=2, rank=rank, world_size=world, pad_token_id=256))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in every}) == 1
    seen = [
        tuple(ids[mask.bool()].tolist())
        for batches in every
        for batch in batches
        if batch.num_tokens
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    ]
    assert sorted(seen) == sorted(tuple(data.evaluation[i]["input_ids"]) for i in range(len(data.evaluation)))
    trained = sum(batch.num_trained_tokens for batches in every for batch in batches)
    assert trained == data.evaluation.num_trained.sum()


def test_evaluation_of_the_first_rows(prepared: Prepare) -> None:
    data = prepared(number=60, eval_fraction=0.2)
    batches = eval_batches(data.evaluation, batch_size=2, rank=0, world_size=1, pad_token_id=0, max_samples=3)
    assert sum(batch.num_tokens for batch in batches) == data.evaluation.num_tokens[:3].sum()
