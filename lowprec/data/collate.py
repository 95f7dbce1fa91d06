"""From rows to the tensors of ``model(**inputs)``: the one place that says how attention is cut.

Padded: one sample a row, ``attention_mask`` 0 on the right padding. Packed: no ``attention_mask``; ``position_ids``
restart at 0 with every sample and with the padding, which counts as one more sample that no label belongs to.
Transformers' ``masking_utils`` reads the borders off the restarts and builds the block-diagonal causal mask, with
sliding windows and chunks counted inside a sample; an explicit 4-D mask would lose those, as every layer gets it as it
is. It does so only without an ``attention_mask`` and without a key-value cache, so ``config.use_cache`` must be false.
:func:`lowprec.data.packing_check.check_packing` tries whether a model obeys.
"""

from collections.abc import Sequence

import torch

from lowprec.data.chat import IGNORE
from lowprec.data.samples import Item

Inputs = dict[str, torch.Tensor]


def collate(items: Sequence[Item], pad_token_id: int, *, packed: bool) -> Inputs:
    """Pad rows on the right to the longest.

    Args:
        items: The rows; none at all gives a batch of one row of padding, for a process that has to take part without
            having a sample.
        pad_token_id: Fills ``input_ids``.
        packed: Whether rows hold several samples.

    Returns:
        int64 tensors ``[rows, longest]``: ``input_ids``, ``labels``, and ``position_ids`` or ``attention_mask``.
    """
    num_rows = max(1, len(items))
    longest = max((len(item["input_ids"]) for item in items), default=2)
    input_ids = torch.full((num_rows, longest), pad_token_id, dtype=torch.int64)
    labels = torch.full((num_rows, longest), IGNORE, dtype=torch.int64)
    # A row of padding attends to itself: a softmax over nothing would be NaN.
    attention_mask = torch.zeros((num_rows, longest), dtype=torch.int64) if items else torch.ones_like(input_ids)
    position_ids = torch.arange(longest).repeat(num_rows, 1)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        input_ids[row, :length] = torch.tensor(item["input_ids"])
        labels[row, :length] = torch.tensor(item["labels"])
        attention_mask[row, :length] = 1
        starts = [*item["lengths"], longest - length]
        position_ids[row] = torch.cat([torch.arange(count) for count in starts])
    if packed:
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
