"""``lowprec::transpose_codes``: 8-bit codes in the other orientation, the rows' factors folded in (e4m3 only)."""

import torch
from lowprec_kernels.quantize_rows import reference

from lowprec.ops.backends import Backend, choose, lazily, no_triton

BACKENDS = (
    Backend(
        "triton",
        lazily("quantize_rows.triton_kernel", "transpose_codes"),
        lambda codes, factor: no_triton(codes.device, codes.dtype),
    ),
    Backend("reference", reference.transpose_codes),
)


@torch.library.custom_op("lowprec::transpose_codes", mutates_args=())
def transpose_codes(codes: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """``codes [rows, dim]`` times ``factor [rows]`` as ``[dim, rows']``; rows' is a multiple of 16, filled with zeros."""
    return choose(BACKENDS, codes, factor).run(codes, factor)


@transpose_codes.register_fake
def _(codes: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    rows, dim = codes.shape
    return codes.new_empty(dim, (rows + 15) // 16 * 16)
