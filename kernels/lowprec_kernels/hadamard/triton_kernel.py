"""Block-diagonal Hadamard rotation on the GPU: one tensor-core product with a matrix of signs made in registers.

The signs are exact in bf16 and the sums are kept in fp32, so the only rounding is the output's. At block 128 this costs
256 FLOP an element against 4 bytes of traffic, a third of an H100's tensor rate: the pass stays bound by memory.

Blocks of 256 are four of 64 and sums and differences of the four (H_256 = H_4 x H_64): as many products as at 64, four
additions an element, and no matrix of 256 x 256 in shared memory. The quarters are loaded one by one, so that the sums
are of values that one thread holds.
"""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # numpy has no bf16: the interpreter's products run in fp32


@triton.jit
def signs(ORDER: tl.constexpr, FP32: tl.constexpr, SIZE: tl.constexpr = 0):
    """The Hadamard matrix of +1 and -1, ORDER <= 256: the parity of popcount(i & j). With SIZE, a matrix of that size
    with copies of it on the diagonal."""
    i = tl.arange(0, SIZE if SIZE > 0 else ORDER)
    parity = i[:, None] & i[None, :] & (ORDER - 1)
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    h = (1 - 2 * (parity & 1)).to(tl.float32)
    if SIZE > ORDER:
        h = tl.where((i[:, None] // ORDER) == (i[None, :] // ORDER), h, 0.0)
    return h if FP32 else h.to(tl.bfloat16)


@triton.jit
def quarters(x_ptr, at, inside, h, FP32: tl.constexpr):
    """The four quarters, [groups, 64] each, of groups of 256 neighbours that begin at ``at [groups, 64]``, rotated with
    the signs ``h`` of order 64; to be divided by 16."""
    a, b = _quarter(x_ptr + at, inside, h, FP32), _quarter(x_ptr + at + 64, inside, h, FP32)
    c, d = _quarter(x_ptr + at + 128, inside, h, FP32), _quarter(x_ptr + at + 192, inside, h, FP32)
    return butterfly(a, b, c, d)


@triton.jit
def _quarter(x_ptr, inside, h, FP32: tl.constexpr):
    x = tl.load(x_ptr, inside, 0.0)
    return tl.dot(x.to(tl.float32) if FP32 else x.to(tl.bfloat16), h, input_precision="ieee")


@triton.jit
def butterfly(a, b, c, d):
    """The signs of order 4 times four parts."""
    left, right, left_less, right_less = a + b, c + d, a - b, c - d
    return left + right, left_less + right_less, left - right, left_less - right_less


@triton.jit
def _rotate_rows_256(x_ptr, y_ptr, groups, TILE: tl.constexpr, FP32: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = row[:, None] * 256 + tl.arange(0, 64)[None, :]
    inside = (row < groups)[:, None]
    a, b, c, d = quarters(x_ptr, at, inside, signs(64, FP32), FP32)
    tl.store(y_ptr + at, (a / 16).to(y_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at + 64, (b / 16).to(y_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at + 128, (c / 16).to(y_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at + 192, (d / 16).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _rotate_rows(
    x_ptr, y_ptr, groups, BLOCK: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, FP32: tl.constexpr
):
    """Groups of BLOCK neighbours in memory, TILE groups a program."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < groups)[:, None]
    x = tl.load(x_ptr + at, inside, 0.0)
    x = x.to(tl.float32) if FP32 else x.to(tl.bfloat16)
    y = tl.dot(x, signs(BLOCK, FP32), input_precision="ieee") * SCALE
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _rotate_columns(
    x_ptr, y_ptr, dim, BLOCK: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, FP32: tl.constexpr
):
    """BLOCK rows by TILE columns a program, rotated along the rows' axis."""
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * dim + column[None, :]
    inside = (column < dim)[None, :]
    x = tl.load(x_ptr + at, inside, 0.0)
    x = x.to(tl.float32) if FP32 else x.to(tl.bfloat16)
    y = tl.dot(signs(BLOCK, FP32), x, input_precision="ieee") * SCALE
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _rotate_columns_256(x_ptr, y_ptr, dim, TILE: tl.constexpr, FP32: tl.constexpr):
    """256 rows by TILE columns a program, rotated along the rows' axis, held as four quarters."""
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1).to(tl.int64) * 256 + tl.arange(0, 64)
    at = row[:, None] * dim + column[None, :]
    step = dim.to(tl.int64) * 64
    inside = (column < dim)[None, :]
    h = signs(64, FP32)
    a = _upper_quarter(x_ptr + at, inside, h, FP32)
    b = _upper_quarter(x_ptr + at + step, inside, h, FP32)
    c = _upper_quarter(x_ptr + at + 2 * step, inside, h, FP32)
    d = _upper_quarter(x_ptr + at + 3 * step, inside, h, FP32)
    a, b, c, d = butterfly(a, b, c, d)
    tl.store(y_ptr + at, (a / 16).to(y_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at + step, (b / 16).to(y_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at + 2 * step, (c / 16).to(y_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at + 3 * step, (d / 16).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _upper_quarter(x_ptr, inside, h, FP32: tl.constexpr):
    x = tl.load(x_ptr, inside, 0.0)
    return tl.dot(h, x.to(tl.float32) if FP32 else x.to(tl.bfloat16), input_precision="ieee")


def rotate(x: torch.Tensor, block: int, axis: int = -1) -> torch.Tensor:
    """``reference.rotate`` for a matrix in bf16, fp16 (its values rounded to bf16 first) or fp32."""
    assert 16 <= block <= 256, f"block {block}: the tensor cores' product needs 16 to 256"
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    fp32 = INTERPRETED or x.dtype == torch.float32
    scale = block**-0.5
    tile = 16384 // block if not fp32 else 32
    if axis == 0:
        rows, dim = x.shape
        assert rows % block == 0
        grid = (triton.cdiv(dim, tile), rows // block)
        if block == 256:
            _rotate_columns_256[grid](x, y, dim, tile, fp32, num_warps=8)
        else:
            _rotate_columns[grid](x, y, dim, block, tile, scale, fp32, num_warps=8)
        return y
    assert x.shape[-1] % block == 0
    groups = x.numel() // block
    programs = triton.cdiv(groups, tile)
    if block == 256:
        _rotate_rows_256[(programs,)](x, y, groups, tile, fp32, num_warps=8)
    else:
        _rotate_rows[(programs,)](x, y, groups, block, tile, scale, fp32, num_warps=8)
    return y
