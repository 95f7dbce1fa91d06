"""What batches are made of: rows of one sample or several, whose sizes are known without reading them."""

from enum import Enum
from typing import Protocol, TypedDict

import numpy as np


class PackedAttention(Enum):
    """What keeps the samples of a packed row apart, beside ``position_ids`` that restart."""

    DOCUMENTS = "lengths of the samples, which the attention of lowprec.attention reads"
    POSITIONS = "position_ids alone"
    BOOL_MASK = "4-D mask, true where attention is allowed"
    FLOAT_MASK = "4-D mask, added to the scores"


class Item(TypedDict):
    """Arrays are int32 ``[tokens]``; ``labels`` are unshifted, -100 where nothing is trained. ``lengths`` are those of
    the samples in the row."""

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: list[int]


class Rows(Protocol):
    """Map-style rows."""

    num_tokens: np.ndarray
    """int64 ``[len(self)]``: tokens of each row."""
    num_trained: np.ndarray
    """int64 ``[len(self)]``: tokens of each row that give loss."""
    attention: PackedAttention | None
    """How samples that share a row are kept apart; None where every row is one sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest sample."""
        ...

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        ...
