"""The split follows contents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.data.split import held_out
from lowprec.errors import UserError

contents = st.lists(st.text("abcd", max_size=3), min_size=2, max_size=60).filter(lambda keys: len(set(keys)) > 1)


@given(contents, st.floats(0.001, 0.999), st.randoms(use_true_random=False))
def test_equal_contents_stay_together_in_any_order(keys: list[str], fraction: float, random) -> None:
    chosen = held_out(np.array(keys), fraction)
    out, kept = ({k for k, c in zip(keys, chosen, strict=True) if c is side} for side in (np.True_, np.False_))
    assert out and kept and not out & kept
    distinct = len(set(keys))
    assert len(out) == min(max(1, round(fraction * distinct)), distinct - 1)
    shuffled = random.sample(keys, len(keys))
    assert {k for k, c in zip(shuffled, held_out(np.array(shuffled), fraction), strict=True) if c} == out


def test_added_data_move_few_samples() -> None:
    keys = np.array([f"sample {i}" for i in range(1000)])
    before = set(keys[held_out(keys, 0.1)])
    more = np.append(keys, [f"new {i}" for i in range(100)])
    after = set(more[held_out(more, 0.1)])
    assert len(before & after) >= 90


def test_a_split_of_one_content_is_refused() -> None:
    with pytest.raises(UserError, match=r"3 samples with 1 distinct.*data\.eval_path"):
        held_out(np.array(["a", "a", "a"]), 0.5)
