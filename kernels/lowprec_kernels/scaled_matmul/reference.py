"""The product of 8-bit matrices with their scales: the definition.

Y[m, n] = s_a[m] s_b[n] sum over k of A[m, k] B[n, k], plus bias[n], plus a term of low rank, sum over r of L[m, r]
U[n, r] (of a LoRA layer: L = s X A^T, U = B). A and B lie along the contraction ("TN"), the only order that 8-bit
tensor cores read. Scales are fp32, one element (a tensor scale) or one a row.
"""

import torch


def scaled_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = False,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """``a [M, K]`` and ``b [N, K]`` in e4m3 or int8, ``bias [N]``, give ``[M, N]``. fp64 scales make the product fp64.
    ``low [M, r]`` in the output's dtype and ``up [N, r]`` in any, which is rounded to that of ``low``.

    ``fast_accumulation`` lets the hardware keep fewer bits of e4m3 sums; here it changes nothing.
    """
    work = torch.promote_types(scale_a.dtype, torch.float32)
    y = a.to(work) @ b.to(work).t()
    y = y * scale_a.reshape(-1, 1) * scale_b.reshape(1, -1)
    if bias is not None:
        y = y + bias.to(work)
    if low is not None and up is not None:
        y = y + low.to(work) @ up.to(low.dtype).to(work).t()
    return y.to(out_dtype)


def add_low_rank(y: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor:
    """``y [M, N]`` plus the term of low rank, in place and in its dtype: where the product does not add it."""
    return y if low is None or up is None else y.addmm_(low, up.to(y.dtype).t())
