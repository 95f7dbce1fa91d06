"""NF4 to the operand of a product in one pass: decode, rotate, scale, cast, and transpose where the product wants it.
Definitions: reference.py. Traffic an element: 0.52 bytes read, 2 written in bf16, 1 in 8 bits.

Block scales are decoded in the kernel, with double quantisation too: no pass of their own, no fp32 copy of them.
Everything is addressed in units, neighbours in memory that lie within one row and share a scale.

To 8 bits an element takes 6.4 to 10.3 instructions in the loops of the code that Triton 3.6 makes for sm_90, where it
took 18.5 to 36.8 with a program for each tile:
- a byte, two elements, is one lookup in a table of 256 words, which a program makes for itself;
- the signs are made once a program, which stays for several tiles;
- the scales of a unit and of its row are one factor, applied after a rotation that stays within the unit;
- int8 is cut to [0, 1], which costs nothing in the sum before, and only then spread over the codes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lowprec_kernels.hadamard.triton_kernel import INTERPRETED, signs
from lowprec_kernels.nf4.reference import Packed
from lowprec_kernels.quantize_rows.reference import LARGEST_CODE
from lowprec_kernels.quantize_rows.triton_kernel import ROUND, _cast, cores_and_shared

LEAST_SUM = 32
"""Order of the signs at least. Of numbers that were bytes when they were loaded, products over 16 gave wrong codes on
an H100 (Triton 3.6, 70 x 576 in tiles of 16 rows); over 64, as all layers have them, they are right."""
CLAMPED = tl.constexpr(INTERPRETED or torch.version.hip is not None)  # elsewhere the cast to e4m3 saturates by itself


@triton.jit
def _pair_table(levels_ptr):
    """The two levels of each byte in fp16, the first in the low half: int32 [256]."""
    byte = tl.arange(0, 256)
    first = tl.load(levels_ptr + (byte >> 4)).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    second = tl.load(levels_ptr + (byte & 15)).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (first & 0xFFFF) | (second << 16)


@triton.jit
def _table(levels_ptr, CODES: tl.constexpr):
    """What ``_levels`` looks up. Codes take two levels at once, in fp16; values are those of the 16 levels in fp32."""
    return _pair_table(levels_ptr) if CODES else tl.load(levels_ptr + tl.arange(0, 16))


@triton.jit
def _levels(packed_ptr, unit, there, table, UNIT: tl.constexpr, CODES: tl.constexpr):
    """The levels of units [n], whatever outside: [n, UNIT], fp16 for codes, fp32 for values."""
    half = tl.arange(0, UNIT // 2)
    packed = tl.load(packed_ptr + unit.to(tl.int64)[:, None] * (UNIT // 2) + half[None, :], there[:, None], 0)
    pair = tl.ravel(packed).to(tl.int32)
    if CODES:
        word = tl.gather(table, pair, 0)
        first, second = word.to(tl.int16), (word >> 16).to(tl.int16)
        z = tl.join(first.to(tl.float16, bitcast=True), second.to(tl.float16, bitcast=True))
    else:
        z = tl.join(tl.gather(table, pair >> 4, 0), tl.gather(table, pair & 15, 0))
    return tl.reshape(z, [packed.shape[0], UNIT])


@triton.jit
def _scales(
    absmax_ptr, absmax_levels_ptr, absmax_scale_ptr, absmax_offset_ptr, block, there, ABSMAX_BLOCK: tl.constexpr
):
    """fp32, one for each of ``block``, zeros outside."""
    absmax = tl.load(absmax_ptr + block, there, 0)
    if ABSMAX_BLOCK > 0:
        coarse = tl.load(absmax_scale_ptr + block // ABSMAX_BLOCK, there, 0.0)
        absmax = tl.load(absmax_levels_ptr + absmax.to(tl.int32)) * coarse + tl.load(absmax_offset_ptr)
        absmax = tl.where(there, absmax, 0.0)
    return absmax


@triton.jit
def _codes(z, factor, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """z times factor, saturated and rounded to nearest even."""
    if dtype == tl.int8:  # a sum that is cut to [0, 1] is one instruction, and the product and sum after it another
        z = tl.clamp(z * (factor * (0.5 / LARGEST)) + 0.5, 0.0, 1.0)
        return (z * (2 * LARGEST) + (ROUND - LARGEST)).to(tl.int32, bitcast=True).to(tl.int8)
    return _cast(z * factor, LARGEST, dtype) if CLAMPED else (z * factor).to(dtype)


@triton.jit
def _decode_rows(
    packed_ptr, levels_ptr, absmax_ptr, absmax_levels_ptr, absmax_scale_ptr, absmax_offset_ptr, scale_ptr, out_ptr,
    units, units_a_row, tiles, PROGRAMS,
    BLOCK: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, IN_BLOCK: tl.constexpr,
    NORM: tl.constexpr, LARGEST: tl.constexpr, CODES: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """UNITS units at a time, as they lie in memory; IN_BLOCK is a unit or several."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    WITHIN: tl.constexpr = IN_BLOCK == UNIT
    ORDER: tl.constexpr = IN_BLOCK if IN_BLOCK > 32 else 32  # of the signs: see LEAST_SUM
    table = _table(levels_ptr, CODES)
    if IN_BLOCK > 1:
        h = signs(IN_BLOCK, True, ORDER).to(tl.float16) if WITHIN else signs(IN_BLOCK, FP32, ORDER)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, num_stages=1):
        unit = tile * UNITS + tl.arange(0, UNITS)
        there = unit < units
        block = unit // (BLOCK // UNIT)
        factor = _scales(absmax_ptr, absmax_levels_ptr, absmax_scale_ptr, absmax_offset_ptr, block, there, ABSMAX_BLOCK)
        if CODES:
            factor *= NORM / tl.load(scale_ptr + unit // units_a_row, there, 1.0)
        elif IN_BLOCK > 1:
            factor *= NORM
        z = _levels(packed_ptr, unit, there, table, UNIT, CODES)
        if WITHIN:
            z = tl.dot(tl.reshape(z, [UNITS * UNIT // ORDER, ORDER]).to(tl.float16), h)
            z = tl.reshape(z, [UNITS, UNIT])
        z = z.to(tl.float32)
        if IN_BLOCK > UNIT:
            z = tl.reshape(z * factor[:, None], [UNITS * UNIT // ORDER, ORDER]).to(h.dtype)
            z = tl.reshape(tl.dot(z, h, input_precision="ieee"), [UNITS, UNIT])
            factor = tl.full([UNITS], 1.0, tl.float32)
        z = _codes(z, factor[:, None], LARGEST, dtype) if CODES else (z * factor[:, None]).to(dtype)
        at = unit.to(tl.int64)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
        tl.store(out_ptr + at, z, there[:, None])


@triton.jit
def _decode_columns(
    packed_ptr, levels_ptr, absmax_ptr, absmax_levels_ptr, absmax_scale_ptr, absmax_offset_ptr, scale_ptr, out_ptr,
    rows, dim, padded, units_a_row, tiles, PROGRAMS,
    BLOCK: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IN_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, NORM: tl.constexpr, LARGEST: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """ROWS by COLUMNS at a time, down a strip of columns; COLUMNS is a multiple of IN_BLOCK, ROWS of ROW_BLOCK."""
    UNITS: tl.constexpr = COLUMNS // UNIT
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor = NORM / tl.load(scale_ptr + column, column < dim, 1.0)
    table = _table(levels_ptr, True)
    if IN_BLOCK > 1:
        h = signs(IN_BLOCK, FP32, COLUMNS)
    if ROW_BLOCK > 1:
        rows_h = signs(ROW_BLOCK, FP32, ROWS)
    i = tl.arange(0, ROWS * UNITS)
    start = tl.program_id(1) * UNITS + i % UNITS
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, num_stages=1):
        unit_row = tile * ROWS + i // UNITS
        there = (unit_row < rows) & (start < units_a_row)
        unit = unit_row * units_a_row + start
        block = unit // (BLOCK // UNIT)
        absmax = _scales(absmax_ptr, absmax_levels_ptr, absmax_scale_ptr, absmax_offset_ptr, block, there, ABSMAX_BLOCK)
        z = _levels(packed_ptr, unit, there, table, UNIT, True).to(tl.float32)
        z = tl.reshape(z * absmax[:, None], [ROWS, COLUMNS])
        if IN_BLOCK > 1:
            z = tl.dot(z.to(h.dtype), h, input_precision="ieee")
        if ROW_BLOCK > 1:
            z = tl.dot(rows_h, z.to(rows_h.dtype), input_precision="ieee")
        q = _codes(z, factor[None, :], LARGEST, out_ptr.dtype.element_ty)
        row = tile * ROWS + tl.arange(0, ROWS)
        into = (column < dim)[:, None] & (row < padded)[None, :]
        tl.store(out_ptr + column.to(tl.int64)[:, None] * padded + row[None, :], tl.trans(q), into)


class Settings(NamedTuple):
    """How ``decode_nf4`` is launched."""

    tile: tuple[int, int]
    """Rows and columns at a time, with ``in_block`` as many columns as that. Untransposed only their product counts:
    memory is taken as it lies."""
    warps: int
    per_core: int
    """Programs a multiprocessor; 0: one for each tile."""
    registers: int | None = None
    """A thread's at most; None: as many as the compiler likes."""


def settings_for(rotated: bool, codes: bool, transposed: bool) -> Settings:
    """Programs that stay have to fit all at once: in the code that Triton 3.6 makes for sm_90 a thread has 63 registers
    (e4m3), 126 (int8), and transposed 128 (e4m3) or 122 (int8). Transposed to int8, 14336 x 4096 on an H100: 70 us in
    tiles of 64 x 64, 75 of 64 x 128; 4096 x 4096: 26 and 28. Tiles loaded ahead, and levels looked up one by one, were
    no faster."""
    if transposed:
        return Settings((64, 64), 4, 4) if rotated else Settings((64, 128), 4, 4)
    if rotated:
        return Settings((128, 64), 4, 4, 128)
    return Settings((32, 256), 4, 8, 64) if codes else Settings((16, 256), 4, 0)


def decode_nf4(
    weight: Packed,
    rows: int,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    in_block: int = 1,
    row_block: int = 1,
    transposed: bool = False,
    *,
    settings: Settings | None = None,
) -> None:
    """See ``reference.decode_nf4``; ``dim`` a multiple of 16, contiguous ``out``."""
    assert out.is_contiguous() and (scale is not None or not transposed)
    dim, padded = (out.shape[0], out.shape[1]) if transposed else (out.shape[1], rows)
    assert dim % 16 == 0
    if out.numel() == 0:
        return
    chosen = settings or settings_for(in_block > 1 or row_block > 1, scale is not None, transposed)
    (tall, wide), warps, per_core, registers = chosen
    elements = max(tall * wide, 16 * max(in_block, LEAST_SUM) if in_block > 1 else 1)
    wide = max(in_block, LEAST_SUM) if in_block > 1 else wide
    longest = in_block if in_block > 1 else wide
    unit = min(longest, weight.block_size, dim & -dim)  # the last: the largest power of two that divides a row
    absmax_block = weight.absmax_block if weight.absmax_levels is not None else 0
    largest, norm = LARGEST_CODE.get(out.dtype, 0.0), (in_block * row_block) ** -0.5
    pointers = (
        weight.packed, weight.levels, weight.absmax, weight.absmax_levels, weight.absmax_scale, weight.absmax_offset,
        scale, out,
    )  # fmt: skip
    at_once = per_core * cores_and_shared(out.device)[0]
    if transposed:
        tall = max(tall, row_block, LEAST_SUM)
        tiles, strips = triton.cdiv(padded, tall), triton.cdiv(dim, wide)
        programs = min(tiles, max(1, at_once // strips)) if per_core else tiles
        _decode_columns[(programs, strips)](
            *pointers, rows, dim, padded, dim // unit, tiles, programs, weight.block_size, absmax_block, unit, tall,
            wide, in_block, row_block, norm, largest, INTERPRETED, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
        return
    units, units_at_once = rows * dim // unit, elements // unit
    tiles = triton.cdiv(units, units_at_once)
    programs = min(tiles, at_once) if per_core else tiles
    _decode_rows[(programs,)](
        *pointers, units, dim // unit, tiles, programs, weight.block_size, absmax_block, unit, units_at_once, in_block,
        norm, largest, scale is not None, INTERPRETED, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
