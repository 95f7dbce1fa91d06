"""From rows to the tensors of ``model(**inputs)``: the one place that says how attention is cut.

Padded: one sample a row, ``attention_mask`` 0 on the right padding. Packed: no ``attention_mask``; ``position_ids``
restart at 0 with every sample and with the padding, which counts as one more sample that no label belongs to. The
attention of :mod:`lowprec.attention` is told the lengths of the samples besides, and needs no mask. Where a model has
another attention, transformers' ``masking_utils`` reads the borders off the restarts, waiting for the device, and
builds the block-diagonal causal mask, with sliding windows and chunks counted inside a sample. It does so only without
an ``attention_mask`` and without a key-value cache, so ``config.use_cache`` must be false. Models that build their mask
without ``position_ids`` get an explicit 4-D mask, which costs length^2 bytes a row and which every layer takes as it
is, so that it would undo a sliding window. :func:`lowprec.data.fit.fit_to_model` tries which of them a model needs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lowprec.data.chat import IGNORE
from lowprec.data.documents import Documents
from lowprec.data.rows import Item, PackedAttention

Inputs = dict[str, Any]
"""Keyword arguments of a model: tensors, and :class:`Documents`, which moves as a tensor does."""


def collate(
    items: Sequence[Item], pad_token_id: int, *, attention: PackedAttention | None, length: int | None = None
) -> Inputs:
    """Pad rows on the right to the longest, or to ``length`` tokens.

    Args:
        items: The rows; none at all gives a batch of one row of padding, for a process that has to take part without
            having a sample.
        pad_token_id: Fills ``input_ids``.
        attention: For packed rows, how they are cut; None for one sample a row.
        length: Tokens of a row, at least the longest's.

    Returns:
        int64 tensors ``[rows, longest]``: ``input_ids``, ``labels``, and either ``attention_mask`` or ``position_ids``;
        with a mask, also ``attention_mask`` of ``[rows, 1, longest, longest]``, bool or fp32; with DOCUMENTS also
        ``documents``.
    """
    if not items:  # its row of padding attends to itself: a softmax over nothing would be NaN
        items = [_row_of_padding(length or 2, pad_token_id)]
    filled = np.array([len(item["input_ids"]) for item in items])
    longest = length or int(filled.max())
    # Whole arrays at a time: row by row, Python's lock was held for milliseconds, while training waited for it.
    is_token = np.arange(longest) < filled[:, None]
    input_ids, labels = (np.full(is_token.shape, fill, dtype=np.int64) for fill in (pad_token_id, IGNORE))
    input_ids[is_token] = np.concatenate([item["input_ids"] for item in items])
    labels[is_token] = np.concatenate([item["labels"] for item in items])
    inputs: Inputs = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
    if attention is None:
        return inputs | {"attention_mask": torch.from_numpy(is_token.astype(np.int64))}
    counts = [
        n for item, padding in zip(items, longest - filled, strict=True) for n in (*item["lengths"], int(padding)) if n
    ]
    begins = np.cumsum([0, *counts[:-1]])
    position_ids = torch.from_numpy(np.arange(is_token.size) - np.repeat(begins, counts)).view(is_token.shape)
    inputs["position_ids"] = position_ids
    if attention is PackedAttention.DOCUMENTS:
        inputs["documents"] = Documents.of(counts)
    elif attention is not PackedAttention.POSITIONS:
        inputs["attention_mask"] = _block_diagonal(position_ids, as_bool=attention is PackedAttention.BOOL_MASK)
    return inputs


def _row_of_padding(length: int, pad_token_id: int) -> Item:
    return {
        "input_ids": np.full(length, pad_token_id, dtype=np.int32),
        "labels": np.full(length, IGNORE, dtype=np.int32),
        "lengths": [length],
    }


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """What each position is to predict, flattened: ``labels [rows, tokens]`` one to the left, ``IGNORE`` at the end."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE).reshape(-1)


def trained_positions(labels: torch.Tensor) -> torch.Tensor:
    """int64 positions in ``shifted(labels)`` that are trained. Of labels on a GPU this waits for the device."""
    return (shifted(labels) != IGNORE).nonzero().squeeze(-1)


def _block_diagonal(position_ids: torch.Tensor, *, as_bool: bool) -> torch.Tensor:
    """The causal mask ``[rows, 1, queries, keys]`` inside each sample; samples begin where positions are 0."""
    sample = (position_ids == 0).cumsum(-1)
    allowed = (sample[:, :, None] == sample[:, None, :]).tril()[:, None]
    if as_bool:
        return allowed
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
