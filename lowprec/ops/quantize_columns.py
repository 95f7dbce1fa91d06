"""``lowprec::quantize_columns``: rotate along the rows, amax of each column, cast, and write the codes transposed;
``lowprec::requantize_columns``: the same from row-wise codes, with scales that are known."""

import torch
from lowprec_kernels.quantize_rows import reference

from lowprec.ops.backends import Backend, choose, define, lazily, no_rotation, no_triton


def _no_triton(x, block, dtype) -> str | None:
    if x.dtype == torch.float64:
        return "fp64 runs in the reference"
    return no_rotation(block) or no_triton(x.device, dtype)


def _no_triton_again(codes, scale, in_block, row_block, column_scale) -> str | None:
    return no_rotation(in_block) or no_rotation(row_block) or no_triton(codes.device, codes.dtype)


BACKENDS = (
    Backend("triton", lazily("quantize_rows.triton_kernel", "quantize_columns"), _no_triton),
    Backend("reference", reference.quantize_columns),
)
REQUANTIZE_BACKENDS = (
    Backend("triton", lazily("quantize_rows.requantize_kernel", "requantize_columns"), _no_triton_again),
    Backend("reference", reference.requantize_columns),
)


def _padded(rows: int, block: int) -> int:
    multiple = max(block, 16)
    return (rows + multiple - 1) // multiple * multiple


def _run(x, block, dtype):
    return choose(BACKENDS, x, block, dtype).run(x, block, dtype)


def _fake(x, block, dtype):
    rows, dim = x.shape
    scales = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(dim, _padded(rows, block), dtype=dtype), x.new_empty(dim, dtype=scales)


def _run_again(codes, scale, in_block, row_block, column_scale):
    args = (codes, scale, in_block, row_block, column_scale)
    return choose(REQUANTIZE_BACKENDS, *args).run(*args)


def _fake_again(codes, scale, in_block, row_block, column_scale):
    rows, dim = codes.shape
    return codes.new_empty(dim, _padded(rows, row_block))


quantize_columns = define("quantize_columns(Tensor x, int block, ScalarType dtype) -> (Tensor, Tensor)", _run, _fake)
"""``quantize_columns(x, block, dtype)``: codes ``[dim, rows']`` and fp32 scales ``[dim]`` of ``x [rows, dim]``, rotated
along the rows; see the reference."""

requantize_columns = define(
    "requantize_columns(Tensor codes, Tensor scale, int in_block, int row_block, Tensor column_scale) -> Tensor",
    _run_again,
    _fake_again,
)
"""``requantize_columns(codes, scale, in_block, row_block, column_scale)``: codes ``[dim, rows']``; see the
reference."""
