"""Factors of scales that lie along a sum, in one launch of one program: torch takes three and a copy. Definition:
reference.py."""

import torch
import triton
import triton.language as tl

from lowprec_kernels.quantize_rows.triton_kernel import _magnitude_bits

BLOCK, WARPS = 4096, 16


@triton.jit
def _products(scale_ptr, partner_ptr, row, rows, PARTNER: tl.constexpr):
    product = tl.load(scale_ptr + row, row < rows, 0.0)
    return product * tl.load(partner_ptr + row, row < rows, 0.0) if PARTNER else product


@triton.jit(do_not_specialize=["rows"])
def _fold_scales(
    scale_ptr, partner_ptr, factor_ptr, largest_ptr, rows, copies, PARTNER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offsets = tl.arange(0, BLOCK)
    bits = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        bits = tl.maximum(bits, _magnitude_bits(_products(scale_ptr, partner_ptr, start + offsets, rows, PARTNER)))
    largest = tl.max(bits, axis=0).to(tl.float32, bitcast=True)
    for start in range(0, rows, BLOCK):
        row = start + offsets
        product = _products(scale_ptr, partner_ptr, row, rows, PARTNER)
        tl.store(factor_ptr + row, tl.div_rn(product, tl.zeros([BLOCK], tl.float32) + largest), row < rows)
    for start in range(0, copies, BLOCK):
        tl.store(largest_ptr + start + offsets, largest, start + offsets < copies)


def fold_scales(
    scale: torch.Tensor, partner: torch.Tensor | None = None, copies: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.fold_scales``; contiguous fp32 scales of at least one row, which are read twice."""
    (rows,) = scale.shape
    factor, largest = torch.empty_like(scale), scale.new_empty(copies)
    _fold_scales[(1,)](scale, partner, factor, largest, rows, copies, partner is not None, BLOCK, num_warps=WARPS)
    return factor, largest
