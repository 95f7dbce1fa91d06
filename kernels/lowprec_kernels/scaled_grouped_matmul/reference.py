"""The product of groups of rows, each with its own 8-bit matrix: the definition.

Y[m, n] = s_a[m] s_b[e, n] sum over k of A[m, k] B[e, n, k], where e is the group of row m. The rows of a group follow
each other; ``offsets [groups]`` says where each group ends, so an empty one ends where the one before it does.
"""

import torch

from lowprec_kernels.scaled_matmul.reference import scaled_matmul


def scaled_grouped_matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = False,
) -> torch.Tensor:
    """``a [M, K]`` and ``b [groups, N, K]`` in e4m3, scales ``[M]`` and ``[groups, N]``, give ``[M, N]``. fp64 scales
    make the product fp64. The last of ``offsets`` is M.

    ``fast_accumulation`` lets the hardware keep fewer bits of e4m3 sums; here it changes nothing.
    """
    y = a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)
    start = 0
    for group, end in enumerate(offsets.tolist()):
        rows = slice(start, end)
        y[rows] = scaled_matmul(a[rows], scale_a[rows], b[group], scale_b[group], None, out_dtype)
        start = end
    return y
