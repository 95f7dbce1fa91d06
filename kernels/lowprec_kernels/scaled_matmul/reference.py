"""The product of 8-bit matrices with their scales: the definition.

Y[m, n] = s_a[m] s_b[n] sum over k of A[m, k] B[n, k]. Both operands lie along the contraction ("TN"), the only order
that 8-bit tensor cores read. Scales are fp32, one element (a tensor scale) or one a row.
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
) -> torch.Tensor:
    """``a [M, K]`` and ``b [N, K]`` in e4m3 or int8, ``bias [N]``, give ``[M, N]``. fp64 scales make the product fp64.

    ``fast_accumulation`` lets the hardware keep fewer bits of e4m3 sums; here it changes nothing.
    """
    work = torch.promote_types(scale_a.dtype, torch.float32)
    y = a.to(work) @ b.to(work).t()
    y = y * scale_a.reshape(-1, 1) * scale_b.reshape(1, -1)
    if bias is not None:
        y = y + bias.to(work)
    return y.to(out_dtype)
