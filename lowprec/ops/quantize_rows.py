"""``lowprec::quantize_rows``: rotate, amax of each row, scale, saturate, cast to e4m3 or int8, in one pass."""

import torch
from lowprec_kernels.quantize_rows import reference

from lowprec.ops.backends import Backend, choose, lazily, no_triton

LARGEST_DIM = 32768
"""A whole row is held by one program."""


def _no_triton(x: torch.Tensor, block: int, dtype: torch.dtype, partner: torch.Tensor | None) -> str | None:
    if x.shape[-1] > LARGEST_DIM:
        return f"a row of {x.shape[-1]} is longer than {LARGEST_DIM}"
    if block != 1 and not 16 <= block <= 256:
        return f"a block of {block} is outside the 16 to 256 of the tensor cores' product"
    if x.dtype == torch.float64:
        return "fp64 runs in the reference"
    return no_triton(x.device, dtype)


BACKENDS = (
    Backend("triton", lazily("quantize_rows.triton_kernel", "quantize_rows"), _no_triton),
    Backend("reference", reference.quantize_rows),
)


@torch.library.custom_op("lowprec::quantize_rows", mutates_args=())
def quantize_rows(
    x: torch.Tensor, block: int, dtype: torch.dtype, partner: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[rows, dim]`` and scales ``[rows]`` (fp32) of ``x [rows, dim]``, rotated along ``dim``; see the reference."""
    return choose(BACKENDS, x, block, dtype, partner).run(x, block, dtype, partner)


@quantize_rows.register_fake
def _(x: torch.Tensor, block: int, dtype: torch.dtype, partner: torch.Tensor | None = None):
    scales = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=scales)
