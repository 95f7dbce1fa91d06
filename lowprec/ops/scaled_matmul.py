"""``lowprec::scaled_matmul``: the product of two 8-bit matrices, both along the contraction, with the scales of their
rows.

On a Hopper GPU int8 and fast-accumulating e4m3 products go through the persistent Triton kernel; e4m3 products that
keep fp32 sums go through cuBLAS by ``torch._scaled_mm``.
"""

from functools import cache

import torch
from lowprec_kernels.scaled_matmul import reference
from lowprec_kernels.scaled_matmul.reference import add_low_rank

from lowprec.ops.backends import FP8, Backend, choose, define, lazily, no_hopper, no_triton


def _no_persistent(a, scale_a, b, scale_b, bias, out_dtype, fast_accumulation, low=None, up=None) -> str | None:
    if a.dtype == FP8 and not fast_accumulation:
        return "it sums e4m3 products as the tensor cores do, and fp32 sums were asked for"
    if out_dtype.itemsize != 2:
        return "its output is 16-bit"
    if not (a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0):
        return "dimensions must be multiples of 16"
    return no_hopper(a.device)


def _no_torch(a, scale_a, b, scale_b, bias, out_dtype, fast_accumulation, low=None, up=None) -> str | None:
    if a.dtype != FP8:
        return "torch._scaled_mm takes fp8 only"
    if 0 in (*a.shape, *b.shape):
        return "empty operands"
    if not (a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0):
        return "dimensions must be multiples of 16"
    return no_triton(a.device, FP8)  # the same conditions: CUDA, 8.9 or newer


def _run_torch(a, scale_a, b, scale_b, bias, out_dtype, fast_accumulation, low=None, up=None) -> torch.Tensor:
    """One scale each, or row scales for both, since cuBLAS takes no mixture: one of them alone is expanded."""
    if scale_a.numel() > 1 or scale_b.numel() > 1:
        scale_a = scale_a.reshape(-1, 1).expand(a.shape[0], 1).contiguous()
        scale_b = scale_b.reshape(1, -1).expand(1, b.shape[0]).contiguous()
    y = torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=fast_accumulation
    )
    return add_low_rank(y if bias is None else y + bias.to(y.dtype), low, up)


def _no_simple(a, scale_a, b, scale_b, bias, out_dtype, fast_accumulation, low=None, up=None) -> str | None:
    return no_triton(a.device, a.dtype)


BACKENDS = (
    Backend("triton, persistent", lazily("scaled_matmul.triton_kernel", "persistent_scaled_matmul"), _no_persistent),
    Backend("torch._scaled_mm", _run_torch, _no_torch),
    Backend("triton", lazily("scaled_matmul.triton_kernel", "scaled_matmul"), _no_simple),
    Backend("reference", reference.scaled_matmul),
)


FUSED_RANK = 32
"""Up to this rank the kernels add the term of low rank: each 16 of it are one more wait of their epilogue. On an H100,
4096 x 14336 x 4096 in e4m3, rank 16 takes 0.382 ms instead of 0.470, rank 64 0.467 instead of 0.463."""


def _run(a, scale_a, b, scale_b, bias=None, out_dtype=torch.bfloat16, fast_accumulation=False, low=None, up=None):
    args = (a, scale_a, b, scale_b, bias, out_dtype, fast_accumulation)
    assert (low is None) == (up is None)
    if low is None or (low.stride(1) == 1 and fuses(low.shape[1], low.dtype, low.device)):
        return choose(BACKENDS, *args).run(*args, low, up)
    return add_low_rank(choose(BACKENDS, *args).run(*args), low, up)


def fuses(rank: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a term of that rank, in that dtype, is added by the product's kernel, which reads ``up`` in any dtype."""
    return rank <= FUSED_RANK and dtype.itemsize == 2 and _tried(device)


@cache
def _tried(device: torch.device) -> bool:
    """Whether the kernels have run there with such a term: on Hopper."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


def _fake(a, scale_a, b, scale_b, bias=None, out_dtype=torch.bfloat16, fast_accumulation=False, low=None, up=None):
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


scaled_matmul = define(
    "scaled_matmul(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor? bias=None,"
    " ScalarType out_dtype=bfloat16, bool fast_accumulation=False, Tensor? low=None, Tensor? up=None) -> Tensor",
    _run,
    _fake,
)
"""``scaled_matmul(a, scale_a, b, scale_b, bias=None, out_dtype=torch.bfloat16, fast_accumulation=False, low=None,
up=None)``: ``a [M, K]``, ``b [N, K]``, scales ``[M]`` or one, ``[N]`` or one, ``low [M, r]``, ``up [N, r]``, give ``[M,
N]``; see the reference."""
