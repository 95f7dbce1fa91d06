"""Rotate + amax + scale + saturate + cast in one pass, 3 bytes of traffic an element; its transposing variant (5: the
scale of a column needs all rows first); and the plain transposition of codes (2). Definitions: reference.py."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lowprec_kernels.hadamard.triton_kernel import INTERPRETED, quarters, signs
from lowprec_kernels.quantize_rows.reference import AMAX_FLOOR, FP8, LARGEST_CODE, TINY, padded_rows

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds an fp32 below 2^22 to the nearest even
FLOOR = tl.constexpr(AMAX_FLOOR)
SMALLEST = tl.constexpr(TINY)


@triton.jit
def _magnitude_bits(x):
    """|x| as an integer: the order of fp32 magnitudes, with NaN above infinity, so that a maximum keeps NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _at_least(x, floor):
    return tl.where(x < floor, floor, x)  # NaN < floor is false: NaN stays


@triton.jit
def _scale_of(bits, LARGEST: tl.constexpr):
    return _at_least(bits.to(tl.float32, bitcast=True), FLOOR) / LARGEST


@triton.jit
def _power_of_two_above(scale):
    up = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return tl.where(scale < 3.0e38, up.to(tl.float32, bitcast=True), scale)


@triton.jit
def _cast(x, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """Saturate and round to nearest even; NaN passes the comparisons and stays NaN in e4m3."""
    x = tl.where(x > LARGEST, LARGEST, x)
    x = tl.where(x < -LARGEST, -LARGEST, x)
    return _rounded(x, dtype)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """The cast of what is at most LARGEST, or above it by fp32's rounding alone."""
    if dtype == tl.int8:  # the integer is in the sum's lowest bits: its lowest byte is the code
        return (x + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    return x.to(dtype)


@triton.jit
def _raised(scale, partner_ptr, row, inside, POWER_OF_TWO: tl.constexpr, PARTNER: tl.constexpr):
    """The scale, or the next one whose product with the partner's is a power of two."""
    if POWER_OF_TWO:
        partner = tl.load(partner_ptr + row, inside, 1.0) if PARTNER else 1.0
        scale = _power_of_two_above(_at_least(scale * partner, SMALLEST)) / partner
        scale = _at_least(scale, SMALLEST)
    return scale


@triton.jit
def store_rows(
    z, q_ptr, s_ptr, partner_ptr, row, column, rows,
    DIM: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, PARTNER: tl.constexpr,
):  # fmt: skip
    """The whole rows ``z [row, column]`` in fp32, zeros outside, as codes and scales."""
    scale = _scale_of(tl.max(_magnitude_bits(z), 1), LARGEST)
    scale = _raised(scale, partner_ptr, row, row < rows, POWER_OF_TWO, PARTNER)
    q = _rounded(z * (1.0 / scale)[:, None], q_ptr.dtype.element_ty)
    tl.store(q_ptr + row[:, None] * DIM + column[None, :], q, (row < rows)[:, None] & (column < DIM)[None, :])
    tl.store(s_ptr + row, scale, row < rows)


@triton.jit
def _quantize_rows(
    x_ptr, q_ptr, s_ptr, partner_ptr, rows, stride, tiles, PROGRAMS,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, PARTNER: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows at a time. Rotated, the tile is read as [groups, BLOCK] and multiplied by the signs, which each
    program makes once: making them costs as much as 40 % of the pass where a program lives for one tile."""
    column = tl.arange(0, PADDED)
    if BLOCK > 1:
        GROUPS: tl.constexpr = PADDED // BLOCK
        i = tl.arange(0, ROWS * GROUPS)
        start = (i % GROUPS) * BLOCK
        h = signs(BLOCK, FP32)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        if BLOCK > 1:
            group_row = (tile * ROWS + i // GROUPS).to(tl.int64)
            there = (group_row < rows) & (start < DIM)
            at = group_row * stride + start
            x = tl.load(x_ptr + at[:, None] + tl.arange(0, BLOCK)[None, :], there[:, None], 0.0)
            x = x.to(tl.float32) if FP32 else x.to(tl.bfloat16)
            z = tl.reshape(tl.dot(x, h, input_precision="ieee") * NORM, [ROWS, PADDED])
        else:
            inside = (row < rows)[:, None] & (column < DIM)[None, :]
            z = tl.load(x_ptr + row[:, None] * stride + column[None, :], inside, 0.0).to(tl.float32)
        store_rows(z, q_ptr, s_ptr, partner_ptr, row, column, rows, DIM, LARGEST, POWER_OF_TWO, PARTNER)


@triton.jit
def _quantize_rows_256(
    x_ptr, q_ptr, s_ptr, partner_ptr, rows, stride, tiles, PROGRAMS,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    PARTNER: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``_quantize_rows`` for blocks of 256, held as four quarters."""
    GROUPS: tl.constexpr = PADDED // 256
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    i = tl.arange(0, ROWS * GROUPS)
    start = (i % GROUPS) * 256
    h = signs(64, FP32)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, num_stages=STAGES):
        group_row = (tile * ROWS + i // GROUPS).to(tl.int64)
        there = ((group_row < rows) & (start < DIM))[:, None]
        lane = start[:, None] + tl.arange(0, 64)[None, :]
        a, b, c, d = quarters(x_ptr, group_row[:, None] * stride + lane, there, h, FP32)
        bits = tl.maximum(
            tl.maximum(_magnitude_bits(a), _magnitude_bits(b)), tl.maximum(_magnitude_bits(c), _magnitude_bits(d))
        )
        bits = tl.max(tl.reshape(tl.max(bits, 1), [ROWS, GROUPS]), 1)
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        scale = _scale_of(_magnitude_bits(bits.to(tl.float32, bitcast=True) / 16), LARGEST)
        scale = _raised(scale, partner_ptr, row, row < rows, POWER_OF_TWO, PARTNER)
        tl.store(s_ptr + row, scale, row < rows)
        inverse = tl.broadcast_to((1.0 / scale)[:, None], [ROWS, GROUPS]) / 16
        inverse = tl.reshape(inverse, [ROWS * GROUPS])[:, None]
        into = q_ptr + group_row[:, None] * DIM + lane
        tl.store(into, _rounded(a * inverse, dtype), there)
        tl.store(into + 64, _rounded(b * inverse, dtype), there)
        tl.store(into + 128, _rounded(c * inverse, dtype), there)
        tl.store(into + 192, _rounded(d * inverse, dtype), there)


@triton.jit
def _rotated_columns(
    x_ptr, rows, dim, stride, row, column, BLOCK: tl.constexpr, NORM: tl.constexpr, FP32: tl.constexpr
):
    """A tile [BLOCK, lanes] of x, zeros outside, rotated along its rows."""
    x = tl.load(x_ptr + row * stride + column[None, :], (row < rows) & (column < dim)[None, :], 0.0)
    if NORM == 1.0:
        return x.to(tl.float32)
    x = x.to(tl.float32) if FP32 else x.to(tl.bfloat16)
    return tl.dot(signs(BLOCK, FP32), x, input_precision="ieee") * NORM


@triton.jit
def _column_amax(
    x_ptr, amax_ptr, rows, dim, stride,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """PARTS x BLOCK rows by COLUMNS columns a program, held as [BLOCK, PARTS * COLUMNS]: one product rotates all."""
    lane = tl.arange(0, PARTS * COLUMNS)
    column = tl.program_id(1) * COLUMNS + lane % COLUMNS
    row = tl.program_id(0).to(tl.int64) * (PARTS * BLOCK)
    row = row + (lane // COLUMNS)[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    z = _rotated_columns(x_ptr, rows, dim, stride, row, column, BLOCK, NORM, FP32)
    bits = tl.max(tl.reshape(tl.max(_magnitude_bits(z), 0), [PARTS, COLUMNS]), 0)
    mine = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.atomic_max(amax_ptr + mine, bits, mine < dim)


@triton.jit
def _quantize_columns(
    x_ptr, q_ptr, amax_ptr, s_ptr, rows, padded, dim, stride,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr, LARGEST: tl.constexpr,
    GIVEN: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """The tiles of ``_column_amax`` once more, now cast and stored transposed."""
    lane = tl.arange(0, PARTS * COLUMNS)
    column = tl.program_id(1) * COLUMNS + lane % COLUMNS
    row = tl.program_id(0).to(tl.int64) * (PARTS * BLOCK)
    row = row + (lane // COLUMNS)[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    z = _rotated_columns(x_ptr, rows, dim, stride, row, column, BLOCK, NORM, FP32)
    if GIVEN:
        scale = tl.load(s_ptr + column, column < dim, 1.0)
    else:
        scale = _scale_of(tl.load(amax_ptr + column, column < dim, 0), LARGEST)
        once = lane + tl.program_id(0) * (PARTS * COLUMNS) < COLUMNS  # each column by one lane of the first programs
        tl.store(s_ptr + column, scale, (column < dim) & once)
    z = z * (1.0 / scale)[None, :]
    q = _cast(z, LARGEST, q_ptr.dtype.element_ty) if GIVEN else _rounded(z, q_ptr.dtype.element_ty)
    tl.store(q_ptr + column.to(tl.int64)[None, :] * padded + row, q, (row < padded) & (column < dim)[None, :])


@triton.jit
def _transpose_codes(
    q_ptr, t_ptr, factor_ptr, rows, padded, dim,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    q = tl.load(q_ptr + row[:, None] * dim + column[None, :], inside, 0.0)
    if FACTOR:
        factor = tl.load(factor_ptr + row, row < rows, 0.0)
        q = (q.to(tl.float32) * factor[:, None]).to(t_ptr.dtype.element_ty)
    into = (column < dim)[:, None] & (row < padded)[None, :]
    tl.store(t_ptr + column[:, None] * padded + row[None, :], tl.trans(q), into)


@cache
def cores_and_shared(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one program may have."""
    if INTERPRETED:
        return 1, 2**20
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", 49152)  # ROCm has none


class RowSettings(NamedTuple):
    """How ``quantize_rows`` is launched."""

    tile: int
    """Elements a program takes at a time; at least one row, and 16 blocks."""
    warps: int
    stages: int
    """2: the next tile is loaded while this one is rotated."""
    per_core: int
    """Programs a multiprocessor; 0: one for each tile."""
    registers: int | None = None
    """A thread's at most; None: as many as the compiler likes."""


def row_settings(padded: int, block: int, shared: int) -> RowSettings:
    """For rows of up to ``padded`` elements, with ``shared`` bytes a program may have. Found by trial on an H100 for
    rows of 1536 to 14336.

    Programs of a grid that stays have to fit all at once: 8 of 128 threads with 64 registers do, and with 68, as the
    compiler gave some, the eighth waits for the others. 128 Mi elements then ran at 79 % (int8, rows of 2048) or 76 %
    (e4m3, 1536) of a copy's bandwidth on an H100, now at 94 and 98 %.
    """
    if block == 1:
        return RowSettings(max(4096, padded), 4 if padded <= 16384 else 8, 1, 0)
    tile = max(16384, padded)
    signs_order = 64 if block == 256 else block
    fits_twice = 4 * tile + 4 * signs_order**2 <= shared  # two tiles of bf16, and the signs twice
    stages = 2 if fits_twice else 1
    if block == 256:
        return RowSettings(tile, tile // 2048, stages, 32768 // tile)
    if padded <= 2048 and block <= 64:
        return RowSettings(4096, 4, 1, 8, 64)
    if padded <= 8192:
        return RowSettings(8192, 4, 1, 4, 128)
    return RowSettings(padded, 8, stages, 4) if padded <= 16384 else RowSettings(padded, 16, stages, 1, 128)


def quantize_rows(
    x: torch.Tensor,
    block: int,
    dtype: torch.dtype,
    power_of_two: bool = False,
    partner: torch.Tensor | None = None,
    *,
    settings: RowSettings | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.quantize_rows``; ``x [rows, dim]`` with contiguous rows, in bf16, fp16 or fp32."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, dim = x.shape
    codes = torch.empty(rows, dim, dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return codes, scale
    padded = triton.next_power_of_2(dim)
    cores, shared = cores_and_shared(x.device)
    tile, warps, stages, per_core, registers = settings or row_settings(padded, block, shared)
    at_once = max(1, tile // padded, 16 * block // padded if block > 1 else 1)
    tiles = triton.cdiv(rows, at_once)
    programs = min(tiles, per_core * cores) if per_core else tiles
    if block == 256:
        _quantize_rows_256[(programs,)](
            x, codes, scale, partner, rows, x.stride(0), tiles, programs, dim, padded, at_once, LARGEST_CODE[dtype],
            power_of_two, partner is not None, INTERPRETED, stages, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
        return codes, scale
    _quantize_rows[(programs,)](
        x, codes, scale, partner, rows, x.stride(0), tiles, programs, dim, padded, block, at_once, block**-0.5,
        LARGEST_CODE[dtype], power_of_two, partner is not None, INTERPRETED, stages, num_warps=warps,
        maxnreg=registers,
    )  # fmt: skip
    return codes, scale


def quantize_columns(
    x: torch.Tensor,
    block: int,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    *,
    columns: int = 32,
    warps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.quantize_columns``; ``x [rows, dim]`` with contiguous rows, in bf16, fp16 or fp32."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, dim = x.shape
    padded = padded_rows(rows, block)
    codes = torch.empty(dim, padded, dtype=dtype, device=x.device)
    given = scale is not None
    if scale is None:
        scale = torch.empty(dim, dtype=torch.float32, device=x.device)
    if codes.numel() == 0:
        return codes, scale if given else scale.fill_(AMAX_FLOOR / LARGEST_CODE[dtype])
    tile = block if block > 1 else 32
    parts = max(1, 512 // tile)
    norm = block**-0.5
    grid = (triton.cdiv(padded, parts * tile), triton.cdiv(dim, columns))
    amax = None
    if not given:
        amax = torch.zeros(dim, dtype=torch.int32, device=x.device)
        _column_amax[grid](x, amax, rows, dim, x.stride(0), tile, parts, columns, norm, INTERPRETED, num_warps=warps)
    _quantize_columns[grid](
        x, codes, amax, scale, rows, padded, dim, x.stride(0), tile, parts, columns, norm, LARGEST_CODE[dtype],
        given, INTERPRETED, num_warps=warps,
    )  # fmt: skip
    return codes, scale


def transpose_codes(
    codes: torch.Tensor, factor: torch.Tensor | None = None, *, tile: tuple[int, int] = (128, 128), warps: int = 4
) -> torch.Tensor:
    """See ``reference.transpose_codes``; contiguous ``codes [rows, dim]``."""
    rows, dim = codes.shape
    assert codes.is_contiguous() and (factor is None or codes.dtype == FP8)
    padded = padded_rows(rows, 1)
    out = torch.empty(dim, padded, dtype=codes.dtype, device=codes.device)
    if out.numel() == 0:
        return out
    plain = factor is None
    _transpose_codes[(triton.cdiv(padded, tile[0]), triton.cdiv(dim, tile[1]))](
        codes.view(torch.int8) if plain else codes, out.view(torch.int8) if plain else out, factor, rows, padded, dim,
        *tile, not plain, num_warps=warps,
    )  # fmt: skip
    return out
