"""Rows of a table in host memory: the definition.

    out[..., :] = weight[ids[...], :], and NaN where an id is not in [0, vocab)

Bits are copied. An id that names no row gives NaN, since a kernel cannot raise, and a finite row would go unnoticed.
"""

import torch
from torch.nn import functional as F


def gather_host_rows(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[..., dim]`` in the dtype of ``weight [vocab, dim]``, on the device of ``ids [...]`` (int64 or int32)."""
    known = ids.to(weight.device)
    outside = (known < 0) | (known >= weight.shape[0])
    rows = F.embedding(known.masked_fill(outside, 0), weight)
    return rows.masked_fill(outside.unsqueeze(-1), float("nan")).to(ids.device)
