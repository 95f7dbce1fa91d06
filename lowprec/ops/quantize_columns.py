"""``lowprec::quantize_columns``: rotate along the rows, amax of each column, cast, and write the codes transposed."""

import torch
from lowprec_kernels.quantize_rows import reference

from lowprec.ops.backends import Backend, choose, lazily, no_triton


def _no_triton(x: torch.Tensor, block: int, dtype: torch.dtype, scale: torch.Tensor | None) -> str | None:
    if block != 1 and not 16 <= block <= 256:
        return f"a block of {block} is outside the 16 to 256 of the tensor cores' product"
    if x.dtype == torch.float64:
        return "fp64 runs in the reference"
    return no_triton(x.device, dtype)


BACKENDS = (
    Backend("triton", lazily("quantize_rows.triton_kernel", "quantize_columns"), _no_triton),
    Backend("reference", reference.quantize_columns),
)


@torch.library.custom_op("lowprec::quantize_columns", mutates_args=())
def quantize_columns(x: torch.Tensor, block: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[dim, rows']`` and scales ``[dim]`` (fp32) of ``x [rows, dim]``, rotated along the rows; see the reference."""
    return choose(BACKENDS, x, block, dtype, None).run(x, block, dtype, None)


@quantize_columns.register_fake
def _(x: torch.Tensor, block: int, dtype: torch.dtype):
    rows, dim = x.shape
    multiple = max(block, 16)
    padded = (rows + multiple - 1) // multiple * multiple
    scales = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(dim, padded, dtype=dtype), x.new_empty(dim, dtype=scales)
