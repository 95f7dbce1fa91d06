"""Decode 4-bit weights as bitsandbytes stores them: the definitions.

A weight W [rows, dim] lies flat in memory, two levels a byte, the first in the high half. ``block_size`` neighbours
share a scale: W[i] = levels[code[i]] * absmax[i // block_size]. With double quantisation the scales are codes
themselves: absmax[j] = absmax_levels[absmax_code[j]] * absmax_scale[j // absmax_block] + absmax_offset.

Three targets, each the operand of a product:

- 16 or 32 bits, [rows, dim];
- 8-bit codes [rows, dim] of W rotated along ``dim``, with one scale a row (the forward product sums over ``dim``);
- 8-bit codes transposed, [dim, rows'], of W rotated along its rows, with one scale a column (the input gradient sums
  over the rows); rows' as in ``quantize_columns``.

The scales of codes are known: they were found once, when the weight was packed, so that one pass suffices.
"""

from typing import NamedTuple

import torch

from lowprec_kernels.hadamard.reference import rotate
from lowprec_kernels.quantize_rows.reference import cast, quantize_columns


class Packed(NamedTuple):
    """A weight as bitsandbytes stores it. The last four are None and 0 without double quantisation."""

    packed: torch.Tensor
    """uint8, ``ceil(rows x dim / 2)`` bytes."""
    levels: torch.Tensor
    """fp32 ``[16]``."""
    absmax: torch.Tensor
    """fp32, or with double quantisation uint8, one a block."""
    block_size: int
    absmax_levels: torch.Tensor | None = None
    """fp32 ``[256]``."""
    absmax_scale: torch.Tensor | None = None
    """fp32, one for ``absmax_block`` scales."""
    absmax_offset: torch.Tensor | None = None
    """fp32, one number."""
    absmax_block: int = 0


def block_scales(weight: Packed) -> torch.Tensor:
    """fp32, one a block."""
    if weight.absmax_levels is None:
        return weight.absmax
    assert weight.absmax_scale is not None and weight.absmax_offset is not None
    coarse = weight.absmax_scale.repeat_interleave(weight.absmax_block)[: weight.absmax.numel()]
    return weight.absmax_levels[weight.absmax.long()] * coarse + weight.absmax_offset


def decode(weight: Packed, rows: int, dim: int) -> torch.Tensor:
    """W ``[rows, dim]`` in fp32."""
    size = rows * dim
    pairs = weight.packed.reshape(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[:size].long()
    return (weight.levels[codes] * block_scales(weight).repeat_interleave(weight.block_size)[:size]).view(rows, dim)


def decode_nf4(
    weight: Packed,
    rows: int,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    in_block: int = 1,
    row_block: int = 1,
    transposed: bool = False,
) -> None:
    """Write W into ``out``, decoded, or as 8-bit codes.

    Args:
        weight: as stored.
        rows: of W.
        out: ``[rows, dim]``, or with ``transposed`` ``[dim, rows']``: its dtype says what is written.
        scale: of codes: ``[rows]``, or with ``transposed`` ``[dim]``; None for values.
        in_block: order of the rotation along ``dim``, 1 for none.
        row_block: order of the rotation along the rows, only with ``transposed``.
    """
    dim = out.shape[0] if transposed else out.shape[1]
    w = rotate(decode(weight, rows, dim), in_block)
    if scale is None:
        out.copy_(w)
    elif transposed:
        out.copy_(quantize_columns(w, row_block, out.dtype, scale)[0])
    else:
        out.copy_(cast(w / scale[:, None], out.dtype))
