"""Data that do not suit the model are refused before training."""

from collections.abc import Callable

import pytest

from lowprec.data import PreparedData, StepLoader, eval_batches, fit_to_model
from lowprec.data.rows import PackedAttention
from lowprec.errors import UserError
from lowprec.testing import tiny_model

Prepare = Callable[..., PreparedData]


def test_a_model_with_fewer_embeddings_than_ids(prepared: Prepare) -> None:
    with pytest.raises(UserError, match="token id 259, but the model embeds 200 ids"):
        fit_to_model(prepared(), tiny_model("llama", vocab_size=200, pad_token_id=0))


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_more_tokens_than_a_table_of_positions_holds(prepared: Prepare, architecture: str) -> None:
    name = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    with pytest.raises(UserError, match=r"57 tokens, and the model has 32 positions; set data\.max_length=32"):
        fit_to_model(prepared(), tiny_model(architecture, **{name: 32}))


def test_rotary_positions_are_only_told(prepared: Prepare) -> None:
    (message,) = fit_to_model(prepared(), tiny_model("llama", max_position_embeddings=32))
    assert "57 tokens, and the model has 32 positions" in message
    assert fit_to_model(prepared(), tiny_model("llama")) == []


def test_packed_rows_learn_how_the_model_is_cut(prepared: Prepare) -> None:
    data = prepared(packing=True)
    fit_to_model(data, tiny_model("opt", attn_implementation="eager", use_cache=False))
    assert data.train.attention is data.evaluation.attention is PackedAttention.FLOAT_MASK
    options = {"rank": 0, "world_size": 1, "pad_token_id": 256}
    loader = StepLoader(data, per_device_batch_size=2, gradient_accumulation_steps=1, seed=0, **options)
    inputs = next(iter(loader)).micro_batches[0]
    assert inputs["attention_mask"].shape[1:] == (1, inputs["input_ids"].shape[1], inputs["input_ids"].shape[1])
    batch = next(iter(eval_batches(data.evaluation, batch_size=2, **options)))
    assert batch.inputs["attention_mask"].ndim == 4


def test_rows_of_one_sample_stay_as_they_are(prepared: Prepare) -> None:
    data = prepared()
    fit_to_model(data, tiny_model("opt"))
    assert data.train.attention is None
