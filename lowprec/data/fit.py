"""Whether prepared data suit a model: its vocabulary, its positions, and how its attention is cut in packed rows."""

import torch
from torch import nn
from transformers import PreTrainedModel

from lowprec.data.collate import collate
from lowprec.data.prepare import PreparedData
from lowprec.data.rows import Item, PackedAttention, Rows
from lowprec.data.samples import join, to_item
from lowprec.data.stream import Stream
from lowprec.errors import UserError

_LEAK_LIMIT = 0.25
"""Largest deviation of a packed sample's logits, as a part of the deviation where nothing is cut. A cut model deviates
by rounding alone (about 1e-6 in fp32, some hundredths in bf16), one that is not cut by about 1."""


def fit_to_model(prepared: PreparedData, model: PreTrainedModel) -> list[str]:
    """Check the data against a loaded model, and settle how packed rows are cut. Call it once, before batching.

    Args:
        prepared: ``train`` and ``evaluation`` learn the model's :class:`PackedAttention`.
        model: A causal language model, bare or with PEFT's adapters, with ``config.use_cache`` false.

    Returns:
        What the user should be told: samples longer than the texts that the model was trained on.

    Raises:
        UserError: the tokenizer has ids that the model has no embedding for, a row is longer than the model's table of
            positions, or packed samples would see each other in this architecture.
    """
    messages = _check_length(max(prepared.train.longest_sample, prepared.evaluation.longest_sample), model)
    _check_vocabulary(prepared.evaluation, model)
    if not isinstance(prepared.train, Stream):
        _check_vocabulary(prepared.train, model)
    if prepared.train.attention is not None:
        prepared.train.attention = prepared.evaluation.attention = packed_attention(model)
    return messages


def packed_attention(model: PreTrainedModel) -> PackedAttention:
    """Find by trial which inputs keep the samples of a packed row apart: the logits must be those of the sample alone.

    Raises:
        UserError: none does.
    """
    config = model.config
    assert not getattr(config, "use_cache", False), "with a key-value cache, transformers does not cut packed rows"
    from lowprec.attention import CAUSAL_SDPA  # that module reads this package

    if config._attn_implementation == CAUSAL_SDPA:
        if _tried(model, [PackedAttention.DOCUMENTS]):
            return PackedAttention.DOCUMENTS
        model.set_attn_implementation("sdpa")  # which cuts by masks
    candidates = [PackedAttention.POSITIONS]
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if window is None:  # a mask of our own would take the place of the windowed one
        is_eager = config._attn_implementation == "eager"
        candidates.append(PackedAttention.FLOAT_MASK if is_eager else PackedAttention.BOOL_MASK)
    found = _tried(model, candidates)
    if found is not None:
        return found
    raise UserError(
        f"data.packing=true does not work with {type(model).__name__} ({config.model_type}, attention "
        f"'{config._attn_implementation}'): samples in one row would see each other. Set data.packing=false."
    )


def _tried(model: PreTrainedModel, candidates: list[PackedAttention]) -> PackedAttention | None:
    """The first that keeps samples apart."""
    was_training = model.training
    model.eval()
    try:
        return next((attention for attention in candidates if _leak(model, attention) < _LEAK_LIMIT), None)
    finally:
        model.train(was_training)


@torch.no_grad()
def _leak(model: PreTrainedModel, attention: PackedAttention) -> float:
    """Deviation of a packed sample's logits from those it has alone, against the deviation where nothing is cut."""
    first, second = (to_item(ids, ids) for ids in ([3, 14, 15, 9, 2, 6], [5, 35, 8, 9, 7, 93, 2, 38]))
    packed = join([first, second])
    swapped: Item = {**packed, "lengths": [8, 6]}
    uncut: Item = {**packed, "lengths": [14]}
    alone = _logits(model, [second], None)[0]
    try:
        # Two rows, since some implementations cut a single row only; the other order tries another border.
        cut = _logits(model, [packed, swapped], attention)[0, 6:]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError):  # inputs that this architecture does not take
        return float("inf")
    free = _logits(model, [uncut], None)[0, 6:]
    return float((cut - alone).norm() / (free - alone).norm().clamp_min(1e-30))


def _logits(model: PreTrainedModel, items: list[Item], attention: PackedAttention | None) -> torch.Tensor:
    device = next(model.parameters()).device
    inputs = collate(items, 0, attention=attention)
    inputs.pop("labels")
    return model(**{name: value.to(device) for name, value in inputs.items()}).logits.double().cpu()


def _check_length(longest: int, model: PreTrainedModel) -> list[str]:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or longest <= positions:
        return []
    text = f"the longest sample has {longest} tokens, and the model has {positions} positions"
    if _has_position_table(model, positions):
        raise UserError(f"{text}; set data.max_length={positions}.")
    return [f"{text}: it was trained on shorter texts. data.max_length={positions} keeps to them."]


def _has_position_table(model: PreTrainedModel, positions: int) -> bool:
    """Whether positions are looked up (OPT's table has two rows more), so that none lies beyond the last."""
    tokens = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return any(table.num_embeddings - positions in (0, 2) for table in tables)


def _check_vocabulary(rows: Rows, model: PreTrainedModel) -> None:
    embeddings = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]  # a weight, not a module
    if rows.largest_id >= embeddings:
        raise UserError(
            f"the data hold the token id {rows.largest_id}, but the model embeds {embeddings} ids only: tokenizer and "
            "model do not belong together. Check model.model_name_or_path."
        )
