"""Cross-entropy of a row in one program: a pass for maximum and sum, and one that writes the gradient over the logits.

Two reads and one write of the logits; the second read comes from the cache, which holds the rows that are under way.
Definition: reference.py.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 4096


@triton.jit
def _scaled(x, scale, softcap, CAPPED: tl.constexpr):
    z = x * scale
    if CAPPED:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _cross_entropy(
    x_ptr, target_ptr, loss_ptr, stride, classes, scale, softcap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    target = tl.load(target_ptr + row)
    column = tl.arange(0, COLUMNS)
    largest = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, classes, COLUMNS):
        inside = start + column < classes
        x = tl.load(x_ptr + start + column, inside, float("-inf")).to(tl.float32)
        z = tl.where(inside, _scaled(x, scale, softcap, CAPPED), float("-inf"))
        higher = tl.maximum(largest, z)
        # Where all that a lane has seen is -inf, -inf - -inf would be NaN.
        total = total * tl.where(largest == higher, 1.0, tl.exp(largest - higher))
        total += tl.where(z == float("-inf"), 0.0, tl.exp(z - higher))
        largest = higher
    peak = tl.max(largest, 0)
    # A maximum drops NaN, but the totals keep it; lanes that saw nothing have no total.
    total = tl.sum(tl.where(total == 0.0, 0.0, total * tl.exp(largest - peak)), 0)
    normalizer = peak + tl.log(total)
    at_target = tl.load(x_ptr + tl.where(target < 0, 0, target)).to(tl.float32)
    at_target = _scaled(at_target, scale, softcap, CAPPED)
    tl.store(loss_ptr + row, tl.where(target < 0, 0.0, normalizer - at_target))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before a thread overwrites it
        for start in range(0, classes, COLUMNS):
            inside = start + column < classes
            x = tl.load(x_ptr + start + column, inside, 0.0).to(tl.float32)
            z = _scaled(x, scale, softcap, CAPPED)
            slope = tl.exp(z - normalizer) - tl.where(start + column == target, 1.0, 0.0)
            slope = slope * scale
            if CAPPED:
                slope = slope * (1.0 - (z / softcap) * (z / softcap))
            slope = tl.where(target < 0, 0.0, slope)
            tl.store(x_ptr + start + column, slope.to(x_ptr.dtype.element_ty), inside)


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float, gradient: bool
) -> torch.Tensor:
    """See ``reference.cross_entropy_``; logits of fp32, bf16 or fp16 whose rows are contiguous."""
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        columns = min(COLUMNS, triton.next_power_of_2(classes))
        _cross_entropy[(rows,)](
            logits, targets, losses, logits.stride(0), classes, scale, softcap, softcap != 0, gradient, columns,
            num_warps=8,
        )  # fmt: skip
    return losses
