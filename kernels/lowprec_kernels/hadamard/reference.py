"""Block-diagonal Hadamard rotation: the definition.

``rotate(x)`` multiplies each group of ``block`` neighbours along one axis by the orthonormal Hadamard matrix H of that
order (Sylvester's construction: H[i, j] = (-1)^popcount(i & j) / sqrt(block)). H is symmetric, so it is its own
transpose and its own inverse. Blocks instead of one transform over the whole axis: they divide every model dimension
(576 = 9 x 64, 14336 = 112 x 128), need no tables for orders that are no power of two, and keep shards independent.
"""

import torch

LARGEST_BLOCK = 64
"""Default order. On SmolLM2 128 gains 0.3 dB in one kind of layer and nothing elsewhere (docs/eight_bit.md), and
costs up to 10 % of the pass's bandwidth (H100: 79 to 92 % of a copy at 128, 87 to 94 % at 64)."""


def rotation_block(dim: int, largest: int = LARGEST_BLOCK) -> int:
    """The largest power of two that divides ``dim`` and is at most ``largest``."""
    assert dim > 0 and largest > 0
    return min(dim & -dim, 1 << (largest.bit_length() - 1))


def hadamard_matrix(order: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthonormal matrix ``[order, order]``; ``order`` is a power of two."""
    assert order > 0 and order & (order - 1) == 0, f"order {order} is no power of two"
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / order**0.5).to(device=device, dtype=dtype)


def rotate(x: torch.Tensor, block: int, axis: int = -1) -> torch.Tensor:
    """``x`` rotated along ``axis`` (0 or -1 of a matrix) in blocks of ``block``, in the dtype of ``x``.

    Computed in fp64 for fp64 and in fp32 for everything else; ``block=1`` returns ``x``.
    """
    if block == 1:
        return x
    if axis == 0:
        return rotate(x.t(), block).t().contiguous()
    *lead, dim = x.shape
    assert dim % block == 0, f"{dim} is no multiple of the block {block}"
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = hadamard_matrix(block, work, x.device)
    return (x.to(work).reshape(-1, block) @ h).reshape(*lead, dim).to(x.dtype)
