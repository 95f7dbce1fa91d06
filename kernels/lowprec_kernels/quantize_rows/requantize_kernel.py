"""Codes by rows to codes by columns, rotated otherwise, in one pass of 2 bytes of traffic an element. Definition:
reference.py."""

import torch
import triton
import triton.language as tl

from lowprec_kernels.hadamard.triton_kernel import INTERPRETED, butterfly, signs
from lowprec_kernels.quantize_rows.reference import LARGEST_CODE, padded_rows
from lowprec_kernels.quantize_rows.triton_kernel import _cast, cores_and_shared


@triton.jit
def _decoded(q_ptr, s_ptr, rows, dim, row, column, h, IN_BLOCK: tl.constexpr, FP32: tl.constexpr):
    """A tile of codes times the scales of their rows, un-rotated by ``h``, not yet divided by IN_BLOCK's root."""
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    q = tl.load(q_ptr + row[:, None] * dim + column[None, :], inside, 0.0)
    z = q.to(tl.float32) * tl.load(s_ptr + row, row < rows, 0.0)[:, None]
    if IN_BLOCK > 1:
        z = z if FP32 else z.to(tl.bfloat16)
        z = tl.dot(z, h, input_precision="ieee")
    return z


@triton.jit
def _cast_columns(
    z, t_ptr, factor, padded, dim, row, column, h, ROW_BLOCK: tl.constexpr, LARGEST: tl.constexpr, FP32: tl.constexpr
):
    """Rotate along the rows by ``h``, cast with the columns' factors, store transposed."""
    if ROW_BLOCK > 1:
        z = z if FP32 else z.to(tl.bfloat16)
        z = tl.dot(h, z, input_precision="ieee")
    q = _cast(z * factor[None, :], LARGEST, t_ptr.dtype.element_ty)
    into = (column < dim)[:, None] & (row < padded)[None, :]
    tl.store(t_ptr + column[:, None] * padded + row[None, :], tl.trans(q), into)


@triton.jit
def _requantize_columns(
    q_ptr, s_ptr, t_ptr, column_scale_ptr, rows, padded, dim, PROGRAMS,
    IN_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
    LARGEST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """ROWS by COLUMNS at a time, down a strip of columns; COLUMNS is IN_BLOCK where that rotates, ROWS a multiple of
    ROW_BLOCK. The signs are made once for all tiles."""
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    factor = NORM / tl.load(column_scale_ptr + column, column < dim, 1.0)
    h, rows_h = signs(COLUMNS, FP32), signs(ROW_BLOCK, FP32, ROWS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(padded, ROWS), PROGRAMS, num_stages=3):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        z = _decoded(q_ptr, s_ptr, rows, dim, row, column, h, IN_BLOCK, FP32)
        _cast_columns(z, t_ptr, factor, padded, dim, row, column, rows_h, ROW_BLOCK, LARGEST, FP32)


@triton.jit
def _requantize_columns_256(
    q_ptr, s_ptr, t_ptr, column_scale_ptr, rows, padded, dim, PROGRAMS,
    ROW_BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, LARGEST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """``_requantize_columns`` for IN_BLOCK = 256, a group of columns a program, held as four quarters."""
    at = tl.program_id(1).to(tl.int64) * 256 + tl.arange(0, 64)
    factor_a = NORM / tl.load(column_scale_ptr + at)
    factor_b = NORM / tl.load(column_scale_ptr + at + 64)
    factor_c = NORM / tl.load(column_scale_ptr + at + 128)
    factor_d = NORM / tl.load(column_scale_ptr + at + 192)
    h, rows_h = signs(64, FP32), signs(ROW_BLOCK, FP32, ROWS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(padded, ROWS), PROGRAMS, num_stages=3):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        a = _decoded(q_ptr, s_ptr, rows, dim, row, at, h, 64, FP32)
        b = _decoded(q_ptr, s_ptr, rows, dim, row, at + 64, h, 64, FP32)
        c = _decoded(q_ptr, s_ptr, rows, dim, row, at + 128, h, 64, FP32)
        d = _decoded(q_ptr, s_ptr, rows, dim, row, at + 192, h, 64, FP32)
        a, b, c, d = butterfly(a, b, c, d)
        _cast_columns(a, t_ptr, factor_a, padded, dim, row, at, rows_h, ROW_BLOCK, LARGEST, FP32)
        _cast_columns(b, t_ptr, factor_b, padded, dim, row, at + 64, rows_h, ROW_BLOCK, LARGEST, FP32)
        _cast_columns(c, t_ptr, factor_c, padded, dim, row, at + 128, rows_h, ROW_BLOCK, LARGEST, FP32)
        _cast_columns(d, t_ptr, factor_d, padded, dim, row, at + 192, rows_h, ROW_BLOCK, LARGEST, FP32)


def requantize_columns(
    codes: torch.Tensor, scale: torch.Tensor, in_block: int, row_block: int, column_scale: torch.Tensor
) -> torch.Tensor:
    """See ``reference.requantize_columns``; contiguous ``codes [rows, dim]``."""
    rows, dim = codes.shape
    padded = padded_rows(rows, row_block)
    out = torch.empty(dim, padded, dtype=codes.dtype, device=codes.device)
    if out.numel() == 0:
        return out
    tall, wide = max(64, row_block), in_block if in_block > 1 else 64
    strips = triton.cdiv(dim, wide)
    programs = triton.cdiv((4 if in_block == 256 else 8) * cores_and_shared(codes.device)[0], strips)
    programs = min(programs, triton.cdiv(padded, tall))
    if in_block == 256:
        _requantize_columns_256[(programs, strips)](
            codes, scale, out, column_scale, rows, padded, dim, programs, row_block, tall, (256 * row_block) ** -0.5,
            LARGEST_CODE[codes.dtype], INTERPRETED, num_warps=8,
        )  # fmt: skip
        return out
    _requantize_columns[(programs, strips)](
        codes, scale, out, column_scale, rows, padded, dim, programs, in_block, row_block, tall, wide,
        (in_block * row_block) ** -0.5, LARGEST_CODE[codes.dtype], INTERPRETED, num_warps=4,
    )  # fmt: skip
    return out
