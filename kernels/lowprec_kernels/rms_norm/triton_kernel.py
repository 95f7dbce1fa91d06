"""Both gradients of RMSNorm in one pass over its rows; partial sums of the weight's are added by a second, small one.

What has to move, over the 3.0 TB/s of a copy on an H100, for 8192 x 2048 in bf16: 2 x 34 MB read, 34 MB written, 34 us.
Liger's kernel (0.8.5) takes 77 us there, after 11 us of zeros written into its result and before 7 us of its sums: one
program a multiprocessor, with one row at a time. Definition: reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.hadamard.triton_kernel import INTERPRETED
from lowprec_kernels.rms_norm import num_programs, row_block, rows_of_tile

ELEMENTS_PER_THREAD = 16
"""Of a tile. H100, bf16: with 8, 131072 x 128 took 63 us instead of 58, wider rows as long."""
SUM_ROWS, SUM_COLUMNS = 256, 16
"""Of a tile of partial sums. H100, 8192 x 2048: 46 to 47 us for the whole also with 512 x 8, 48 with 128 x 32."""


@triton.jit
def _rms_norm_backward(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, sums_ptr, rows, dim, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, column < dim, 0.0).to(tl.float32) + offset
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < dim)[None, :]
        offsets = row.to(tl.int64)[:, None] * dim + column[None, :]
        x = tl.load(x_ptr + offsets, inside, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, inside, 0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < rows, 0.0)[:, None]
        normed = x * rstd
        error = grad * weight[None, :]
        dx = rstd * (error - normed * (tl.sum(error * normed, axis=1) / dim)[:, None])
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), inside)
        if sums_ptr is not None:
            total += grad * normed
    if sums_ptr is not None:
        tl.store(sums_ptr + program * dim + column, tl.sum(total, axis=0), column < dim)


@triton.jit
def _add_sums(sums_ptr, dw_ptr, programs, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < programs)[:, None] & (column < dim)[None, :]
        total += tl.load(sums_ptr + row[:, None] * dim + column[None, :], inside, 0.0)
    tl.store(dw_ptr + column, tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty), column < dim)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """See ``reference.rms_norm_backward``; all contiguous, rows of at most ``LONGEST_ROW``."""
    rows, dim = x.shape
    dx = torch.empty_like(x)
    block, in_tile = row_block(dim), rows_of_tile(dim)
    sums, programs = None, triton.cdiv(rows, in_tile)
    if weight_grad:
        cores = 4 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
        programs = num_programs(rows, dim, cores)
        sums = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    num_warps = max(1, min(16, in_tile * block // (32 * ELEMENTS_PER_THREAD)))
    if rows:
        _rms_norm_backward[(programs,)](
            grad, x, weight, rstd, dx, sums, rows, dim, offset, ROWS=in_tile, BLOCK=block, num_warps=num_warps
        )
    if sums is None:
        return dx, weight.new_empty(0)
    dw = torch.empty_like(weight)
    _add_sums[(triton.cdiv(dim, SUM_COLUMNS),)](
        sums, dw, programs, dim, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=8
    )
    return dx, dw
