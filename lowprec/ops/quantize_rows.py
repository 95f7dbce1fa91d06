"""``lowprec::quantize_rows``: rotate, amax of each row, scale, saturate, cast to e4m3 or int8, in one pass."""

import torch
from lowprec_kernels.quantize_rows import reference

from lowprec.ops.backends import Backend, choose, define, lazily, no_rotation, no_triton

LARGEST_DIM = 32768
"""A whole row is held by one program."""


def _no_triton(x, block, dtype, power_of_two, partner) -> str | None:
    if x.shape[-1] > LARGEST_DIM:
        return f"a row of {x.shape[-1]} is longer than {LARGEST_DIM}"
    if x.dtype == torch.float64:
        return "fp64 runs in the reference"
    return no_rotation(block) or no_triton(x.device, dtype)


BACKENDS = (
    Backend("triton", lazily("quantize_rows.triton_kernel", "quantize_rows"), _no_triton),
    Backend("reference", reference.quantize_rows),
)


def _run(x, block, dtype, power_of_two=False, partner=None):
    return choose(BACKENDS, x, block, dtype, power_of_two, partner).run(x, block, dtype, power_of_two, partner)


def _fake(x, block, dtype, power_of_two=False, partner=None):
    scales = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=scales)


quantize_rows = define(
    "quantize_rows(Tensor x, int block, ScalarType dtype, bool power_of_two=False, Tensor? partner=None)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
)
"""``quantize_rows(x, block, dtype, power_of_two=False, partner=None)``: codes ``[rows, dim]`` and fp32 scales
``[rows]`` of ``x [rows, dim]``, rotated along ``dim``; see the reference."""
