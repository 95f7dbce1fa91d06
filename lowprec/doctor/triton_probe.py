"""A kernel of a few lines: does Triton compile here? Imported only where there is a GPU."""

import torch
import triton
import triton.language as tl


@triton.jit
def _add_one(x, y, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    mask = index < n
    tl.store(y + index, tl.load(x + index, mask=mask) + 1, mask=mask)


def add_one(x: torch.Tensor) -> torch.Tensor:
    """``x + 1`` for at most 128 elements."""
    y = torch.empty_like(x)
    _add_one[(1,)](x, y, x.numel(), BLOCK=128)
    return y
