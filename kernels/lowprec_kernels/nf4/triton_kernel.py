"""NF4 to the operand of a product in one pass: decode, rotate, scale, cast, and transpose where the product wants it.
Definitions: reference.py. Traffic an element: 0.52 bytes read, 2 written in bf16, 1 in 8 bits.

Block scales are decoded in the kernel, with double quantisation too: no pass of their own, no fp32 copy of them.
"""

import torch
import triton
import triton.language as tl

from lowprec_kernels.hadamard.triton_kernel import INTERPRETED, signs
from lowprec_kernels.nf4.reference import Packed
from lowprec_kernels.quantize_rows.reference import LARGEST_CODE
from lowprec_kernels.quantize_rows.triton_kernel import _cast


@triton.jit
def _decode(
    packed_ptr, levels_ptr, absmax_ptr, absmax_levels_ptr, absmax_scale_ptr, absmax_offset_ptr, scale_ptr, out_ptr,
    rows, dim, padded,
    BLOCK: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IN_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, NORM: tl.constexpr, LARGEST: tl.constexpr,
    CODES: tl.constexpr, TRANSPOSED: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """ROWS by COLUMNS a program, read in units that lie within one block each; COLUMNS is IN_BLOCK where that rotates,
    ROWS a multiple of ROW_BLOCK."""
    UNITS: tl.constexpr = COLUMNS // UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS + tl.arange(0, UNITS) * UNIT
    at = row[:, None] * dim + start[None, :]
    there = (row < rows)[:, None] & (start < dim)[None, :]
    block = at // BLOCK
    absmax = tl.load(absmax_ptr + block, there, 0)
    if ABSMAX_BLOCK > 0:
        coarse = tl.load(absmax_scale_ptr + block // ABSMAX_BLOCK, there, 0.0)
        absmax = tl.load(absmax_levels_ptr + absmax.to(tl.int32)) * coarse + tl.load(absmax_offset_ptr)
    absmax = tl.where(there, absmax, 0.0)[:, :, None]
    pairs = (at // 2)[:, :, None] + tl.arange(0, UNIT // 2)[None, None, :]
    pair = tl.load(packed_ptr + pairs, there[:, :, None], 0).to(tl.int32)
    z = tl.join(tl.load(levels_ptr + (pair >> 4)) * absmax, tl.load(levels_ptr + (pair & 15)) * absmax)
    z = tl.reshape(z, [ROWS, COLUMNS])
    if IN_BLOCK > 1:
        z = z if FP32 else z.to(tl.bfloat16)
        z = tl.dot(z, signs(IN_BLOCK, FP32), input_precision="ieee")
    if ROW_BLOCK > 1:
        z = z if FP32 else z.to(tl.bfloat16)
        z = tl.dot(signs(ROW_BLOCK, FP32, ROWS), z, input_precision="ieee")
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        scale = tl.load(scale_ptr + column, column < dim, 1.0)
        q = _cast(z * (NORM / scale)[None, :], LARGEST, out_ptr.dtype.element_ty)
        into = (column < dim)[:, None] & (row < padded)[None, :]
        tl.store(out_ptr + column.to(tl.int64)[:, None] * padded + row[None, :], tl.trans(q), into)
    else:
        if CODES:
            scale = tl.load(scale_ptr + row, row < rows, 1.0)
            z = _cast(z * (NORM / scale)[:, None], LARGEST, out_ptr.dtype.element_ty)
        else:
            z = (z * NORM).to(out_ptr.dtype.element_ty)
        inside = (row < rows)[:, None] & (column < dim)[None, :]
        tl.store(out_ptr + row[:, None] * dim + column[None, :], z, inside)


def decode_nf4(
    weight: Packed,
    rows: int,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    in_block: int = 1,
    row_block: int = 1,
    transposed: bool = False,
    *,
    tile: tuple[int, int] | None = None,
    warps: int = 4,
) -> None:
    """See ``reference.decode_nf4``; ``dim`` a multiple of 16, contiguous ``out``."""
    assert out.is_contiguous() and (scale is not None or not transposed)
    dim, padded = (out.shape[0], out.shape[1]) if transposed else (out.shape[1], rows)
    assert dim % 16 == 0
    if out.numel() == 0:
        return
    # Rotated, a program makes the signs for its tile alone: the tile is made tall, so that they are the smaller part.
    # Transposed to int8, 14336 x 4096 on an H100: 0.088 ms in tiles of 64 x 128, 0.109 of 64 x 64; 4096 x 4096: 0.046
    # and 0.036.
    transposed_tile = (64, 128 if out.numel() > 2**25 else 64)
    tall, wide = tile or (transposed_tile if transposed else (128, 64) if in_block > 1 else (16, 256))
    tall, wide = max(tall, row_block), in_block if in_block > 1 else wide
    unit = min(wide, weight.block_size, dim & -dim)  # the largest power of two that divides a row
    nested = weight.absmax_levels is not None
    _decode[(triton.cdiv(padded, tall), triton.cdiv(dim, wide))](
        weight.packed, weight.levels, weight.absmax, weight.absmax_levels, weight.absmax_scale, weight.absmax_offset,
        scale, out, rows, dim, padded, weight.block_size, weight.absmax_block if nested else 0, unit, tall, wide,
        in_block, row_block, (in_block * row_block) ** -0.5, LARGEST_CODE.get(out.dtype, 0.0), scale is not None,
        transposed, INTERPRETED, num_warps=warps,
    )  # fmt: skip
