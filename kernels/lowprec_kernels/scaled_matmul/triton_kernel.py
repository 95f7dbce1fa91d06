"""The scaled product of 8-bit matrices in Triton; definition: reference.py.

Two kernels with one epilogue. ``_persistent`` (Hopper and newer) has one program a multiprocessor, loads tiles by the
bulk copy engine and overlaps one tile's stores with the next one's products. ``_simple`` runs anywhere.
8192 x 14336 x 4096 on an H100: int8 1299 against 1113 TOP/s, e4m3 1440 against 1329 (cuBLAS, row scales: 1381).

int8 products sum in int32, exactly; e4m3 ones with the tensor cores' own ("fast") accumulation.
"""

import torch
import triton
import triton.language as tl

from lowprec_kernels.hadamard.triton_kernel import INTERPRETED


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
def _scaled(
    acc, m, n, M, N, sa_ptr, sb_ptr, bias_ptr, SCALAR_A: tl.constexpr, SCALAR_B: tl.constexpr, BIAS: tl.constexpr
):
    sa = tl.load(sa_ptr) if SCALAR_A else tl.load(sa_ptr + m, m < M, 0.0)[:, None]
    sb = tl.load(sb_ptr) if SCALAR_B else tl.load(sb_ptr + n, n < N, 0.0)[None, :]
    y = acc.to(tl.float32) * sa * sb
    if BIAS:
        y += tl.load(bias_ptr + n, n < N, 0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _simple(
    a_ptr, b_ptr, y_ptr, sa_ptr, sb_ptr, bias_ptr, M, N, K,
    SCALAR_A: tl.constexpr, SCALAR_B: tl.constexpr, BIAS: tl.constexpr, INTEGER: tl.constexpr, FP32: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
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
    y = _scaled(acc, m, n, M, N, sa_ptr, sb_ptr, bias_ptr, SCALAR_A, SCALAR_B, BIAS)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _persistent(
    a_tiles, b_tiles, y_tiles, sa_ptr, sb_ptr, bias_ptr, M, N, K, PROGRAMS,
    SCALAR_A: tl.constexpr, SCALAR_B: tl.constexpr, BIAS: tl.constexpr, INTEGER: tl.constexpr, FP32: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        row, column = _tile_of(t, tiles_m, tiles_n, BAND)
        acc = tl.zeros([BM, BN], tl.int32 if INTEGER else tl.float32)
        for i in range(0, tl.cdiv(K, BK)):
            a, b = a_tiles.load([row * BM, i * BK]), b_tiles.load([column * BN, i * BK])
            acc = _product(a, b.T, acc, INTEGER, FP32)
        m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
        y = _scaled(acc, m, n, M, N, sa_ptr, sb_ptr, bias_ptr, SCALAR_A, SCALAR_B, BIAS).to(y_tiles.dtype)
        # Stored in two halves: the staging buffer then leaves room for one more stage of loads (1299 against 1228).
        left, right = tl.split(tl.permute(tl.reshape(y, (BM, 2, BN // 2)), (0, 2, 1)))
        y_tiles.store([row * BM, column * BN], left)
        y_tiles.store([row * BM, column * BN + BN // 2], right)


def scaled_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = True,
    *,
    tile: tuple[int, int, int] = (128, 256, 128),
    band: int = 8,
    warps: int = 8,
    stages: int = 3,
) -> torch.Tensor:
    """See ``reference.scaled_matmul``; the kernel that runs anywhere. e4m3 sums are always the tensor cores' own."""
    (M, K), N = a.shape, b.shape[0]
    y = _empty(a, b, out_dtype)
    if y.numel() == 0 or K == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    BM, BN, BK = tile
    _simple[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
        a, b, y, scale_a, scale_b, bias, M, N, K, scale_a.numel() == 1, scale_b.numel() == 1, bias is not None,
        a.dtype == torch.int8, INTERPRETED, BM, BN, BK, band, num_warps=warps, num_stages=stages,
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
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    BM, BN, BK = tile
    tiles = triton.cdiv(M, BM) * triton.cdiv(N, BN)
    cores = 4 if INTERPRETED else torch.cuda.get_device_properties(a.device).multi_processor_count
    programs = min(tiles, cores)
    _persistent[(programs,)](
        TensorDescriptor.from_tensor(a, [BM, BK]), TensorDescriptor.from_tensor(b, [BN, BK]),
        TensorDescriptor.from_tensor(y, [BM, BN // 2]), scale_a, scale_b, bias, M, N, K, programs,
        scale_a.numel() == 1, scale_b.numel() == 1, bias is not None, a.dtype == torch.int8, INTERPRETED, BM, BN, BK,
        band, not INTERPRETED, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def _empty(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    assert a.is_contiguous() and b.is_contiguous() and a.shape[1] == b.shape[1] and a.dtype == b.dtype
    return torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
