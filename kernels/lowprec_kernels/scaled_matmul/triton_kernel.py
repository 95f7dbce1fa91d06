"""The scaled product of 8-bit matrices in Triton; definition: reference.py.

Two kernels with one epilogue, which adds the term of low rank L U^T in fp32. ``_persistent`` (Hopper and newer) has one
program a multiprocessor, loads tiles by the bulk copy engine and overlaps one tile's stores with the next one's
products. ``_simple`` runs anywhere.
8192 x 14336 x 4096 on an H100: int8 1299 against 1113 TOP/s, e4m3 1440 against 1329 (cuBLAS, row scales: 1381).

int8 products sum in int32, exactly; e4m3 ones with the tensor cores' own ("fast") accumulation.
"""

import torch
import triton
import triton.language as tl

from lowprec_kernels.hadamard.triton_kernel import INTERPRETED
from lowprec_kernels.scaled_matmul.reference import add_low_rank


@triton.jit
def _product(a, b, acc, INTEGER: tl.constexpr, FP32: tl.constexpr):
    if FP32:  # the interpreter's product of 8-bit types is not the hardware's: its fp32 one is exact enough
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee").to(acc.dtype)
    return tl.dot(a, b, acc, out_dtype=tl.int32 if INTEGER else tl.float32)


@triton.jit
def _tile_of(t, tiles_m, tiles_n, BAND: tl.constexpr):
    """Tile number to row and column of tiles: BAND rows share the columns that are in the L2 cache."""
    band = t // (BAND * tiles_n)
    height = min(tiles_m - band * BAND, BAND)
    inside = t % (BAND * tiles_n)
    return band * BAND + inside % height, inside // height


@triton.jit
def _halves(y):
    return tl.split(tl.permute(tl.reshape(y, (y.shape[0], 2, y.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _store(y_tiles, y, row, column):
    """In parts as wide as the descriptor's."""
    if y.shape[1] == y_tiles.block_shape[1]:
        y_tiles.store([row, column], y)
    else:
        left, right = _halves(y)
        _store(y_tiles, left, row, column)
        _store(y_tiles, right, row, column + y.shape[1] // 2)


@triton.jit
def _low_rank_tiles(first, m, n, M, N, low_ptr, low_stride, up_ptr, rank):
    """Columns ``first`` to ``first + 16`` of L, ``[BM, 16]``, and of U, ``[16, BN]``, both in the dtype of L."""
    r = first + tl.arange(0, 16)
    low_at = low_ptr + m.to(tl.int64)[:, None] * low_stride + r[None, :]
    low = tl.load(low_at, (m < M)[:, None] & (r < rank)[None, :], 0.0)
    up = tl.load(up_ptr + n[None, :] * rank + r[:, None], (n < N)[None, :] & (r < rank)[:, None], 0.0)
    return low, up.to(low.dtype)


@triton.jit
def _plus_product(y, low, up, BY_WARP: tl.constexpr, FP32: tl.constexpr):
    """``y [BM, BN]`` plus ``low @ up`` in fp32. BY_WARP: as a batch of 16 rows each, for which Triton takes the
    instructions of single warps, with ``y`` staying in the registers that it is in. Were it those of groups of warps,
    ptxas would let each e4m3 one of the main loop wait for the one before (its remark C7515)."""
    if FP32 or not BY_WARP:
        return _product(low, up, y, False, FP32)
    ROWS: tl.constexpr = y.shape[0] // 16
    up = tl.broadcast_to(up[None], (ROWS, 16, y.shape[1]))
    batch = tl.dot(tl.reshape(low, (ROWS, 16, 16)), up, tl.reshape(y, (ROWS, 16, y.shape[1])))
    return tl.reshape(batch, y.shape)


@triton.jit
def _finished(
    acc, m, n, M, N, sa_ptr, sb_ptr, bias_ptr, low_ptr, low_stride, up_ptr, rank,
    SCALAR_A: tl.constexpr, SCALAR_B: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, BY_WARP: tl.constexpr,
    FP32: tl.constexpr,
):  # fmt: skip
    """Y in fp32 from its sums. RANK is ``rank`` filled up to a multiple of 16 (0: no low-rank term), the number of
    columns of L and U that are there at a time: more would not fit beside the tiles of the main loop."""
    if RANK:  # asked for first: they come while the scales do
        low, up = _low_rank_tiles(0, m, n, M, N, low_ptr, low_stride, up_ptr, rank)
    sa = tl.load(sa_ptr) if SCALAR_A else tl.load(sa_ptr + m, m < M, 0.0)[:, None]
    sb = tl.load(sb_ptr) if SCALAR_B else tl.load(sb_ptr + n, n < N, 0.0)[None, :]
    y = acc.to(tl.float32) * sa * sb
    if BIAS:
        y += tl.load(bias_ptr + n, n < N, 0.0).to(tl.float32)[None, :]
    if RANK:
        y = _plus_product(y, low, up, BY_WARP, FP32)
        for first in tl.static_range(16, RANK, 16):
            low, up = _low_rank_tiles(first, m, n, M, N, low_ptr, low_stride, up_ptr, rank)
            y = _plus_product(y, low, up, BY_WARP, FP32)
    return y


@triton.jit(do_not_specialize=["M"])
def _simple(
    a_ptr, b_ptr, y_ptr, sa_ptr, sb_ptr, bias_ptr, M, N, K, low_ptr, low_stride, up_ptr, rank,
    SCALAR_A: tl.constexpr, SCALAR_B: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, INTEGER: tl.constexpr,
    FP32: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row, column = _tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), BAND)
    m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_at = a_ptr + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    b_at = b_ptr + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros([BM, BN], tl.int32 if INTEGER else tl.float32)
    for i in range(0, tl.cdiv(K, BK)):
        a = tl.load(a_at, (k < K - i * BK)[None, :], 0.0)
        b = tl.load(b_at, (k < K - i * BK)[:, None], 0.0)
        acc = _product(a, b, acc, INTEGER, FP32)
        a_at += BK
        b_at += BK
    y = _finished(
        acc, m, n, M, N, sa_ptr, sb_ptr, bias_ptr, low_ptr, low_stride, up_ptr, rank,
        SCALAR_A, SCALAR_B, BIAS, RANK, False, FP32,
    )  # fmt: skip
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "PROGRAMS"])  # nine programs of a second each to compile, for no faster one
def _persistent(
    a_tiles, b_tiles, y_tiles, sa_ptr, sb_ptr, bias_ptr, M, N, K, PROGRAMS, low_ptr, low_stride, up_ptr, rank,
    SCALAR_A: tl.constexpr, SCALAR_B: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, INTEGER: tl.constexpr,
    FP32: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    if RANK:  # else Triton compiles the case of no products, too, and finds no room for L and U in it
        tl.assume(tl.cdiv(K, BK) > 0)
    for t in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        row, column = _tile_of(t, tiles_m, tiles_n, BAND)
        acc = tl.zeros([BM, BN], tl.int32 if INTEGER else tl.float32)
        for i in range(0, tl.cdiv(K, BK)):
            a, b = a_tiles.load([row * BM, i * BK]), b_tiles.load([column * BN, i * BK])
            acc = _product(a, b.T, acc, INTEGER, FP32)
        # With a low-rank term in halves: its operands, too, want registers.
        PARTS: tl.constexpr = 2 if RANK else 1
        parts = _halves(acc) if RANK else (acc,)
        for part in tl.static_range(PARTS):
            m, first = row * BM + tl.arange(0, BM), column * BN + part * (BN // PARTS)
            n = first + tl.arange(0, BN // PARTS)
            y = _finished(
                parts[part], m, n, M, N, sa_ptr, sb_ptr, bias_ptr, low_ptr, low_stride, up_ptr, rank,
                SCALAR_A, SCALAR_B, BIAS, RANK, True, FP32,
            )  # fmt: skip
            _store(y_tiles, y.to(y_tiles.dtype), row * BM, first)


def scaled_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = True,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    *,
    tile: tuple[int, int, int] = (128, 256, 128),
    band: int = 8,
    warps: int = 8,
    stages: int = 3,
) -> torch.Tensor:
    """See ``reference.scaled_matmul``; the kernel that runs anywhere. e4m3 sums are always the tensor cores' own.
    ``low`` is 16-bit."""
    (M, K), N = a.shape, b.shape[0]
    y = _empty(a, b, out_dtype)
    if y.numel() == 0 or K == 0:
        return add_low_rank(y.zero_() if bias is None else y.copy_(bias.expand_as(y)), low, up)
    low_rank, RANK = _low_rank(low, up)
    BM, BN, BK = tile
    _simple[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
        a, b, y, scale_a, scale_b, bias, M, N, K, *low_rank, scale_a.numel() == 1, scale_b.numel() == 1,
        bias is not None, RANK, a.dtype == torch.int8, INTERPRETED, BM, BN, BK, band,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def persistent_scaled_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = True,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    *,
    tile: tuple[int, int, int] = (128, 256, 128),
    band: int = 8,
    warps: int = 8,
    stages: int = 4,
) -> torch.Tensor:
    """See ``reference.scaled_matmul``; Hopper and newer, N and K multiples of 16, 16-bit output."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (M, K), N = a.shape, b.shape[0]
    y = _empty(a, b, out_dtype)
    if y.numel() == 0 or K == 0:
        return add_low_rank(y.zero_() if bias is None else y.copy_(bias.expand_as(y)), low, up)
    low_rank, RANK = _low_rank(low, up)
    BM, BN, BK = tile
    tiles = triton.cdiv(M, BM) * triton.cdiv(N, BN)
    cores = 4 if INTERPRETED else torch.cuda.get_device_properties(a.device).multi_processor_count
    programs = min(tiles, cores)
    # Stored in parts: the staging buffer then leaves room for one more stage of loads (1299 against 1228), and L, U.
    parts = 4 if RANK else 2
    _persistent[(programs,)](
        TensorDescriptor.from_tensor(a, [BM, BK]), TensorDescriptor.from_tensor(b, [BN, BK]),
        TensorDescriptor.from_tensor(y, [BM, BN // parts]), scale_a, scale_b, bias, M, N, K, programs, *low_rank,
        scale_a.numel() == 1, scale_b.numel() == 1, bias is not None, RANK, a.dtype == torch.int8, INTERPRETED,
        BM, BN, BK, band, not INTERPRETED, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def _low_rank(low: torch.Tensor | None, up: torch.Tensor | None) -> tuple[tuple, int]:
    """L and U as the kernels take them, and RANK."""
    if low is None or up is None:
        return (None, 0, None, 0), 0
    assert low.dtype.itemsize == 2 and low.stride(1) == 1 and low.shape[1] == up.shape[1]
    return (low, low.stride(0), up.contiguous(), up.shape[1]), triton.cdiv(up.shape[1], 16) * 16


def _empty(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    assert a.is_contiguous() and b.is_contiguous() and a.shape[1] == b.shape[1] and a.dtype == b.dtype
    return torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
