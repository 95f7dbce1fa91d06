"""Norm and flag in one launch: programs leave the sums of their parts, and the last one adds them up.

Which program is last does not matter to the result: it adds the same sums in the same order. Definition: reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, PROGRAMS, NUM_WARPS = 4096, 1024, 8  # programs: at most; also the number of sums that the last one adds


def make_scratch(device: torch.device) -> Tensor:
    """What launches in one stream share: how many programs are done, which is 0 between launches, and their sums."""
    return torch.zeros(1 + PROGRAMS, device=device)


# The norm of one parameter is an entry of a vector: compiled once, wherever it lies.
@triton.jit(do_not_specialize=["repeats"], do_not_specialize_on_alignment=["norm_ptr", "found_inf_ptr"])
def _gradient_norm(
    x_ptr, norm_ptr, found_inf_ptr, scratch_ptr, count, repeats, TILE: tl.constexpr, PROGRAMS: tl.constexpr
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    offsets = tl.arange(0, TILE)
    squares = tl.zeros([TILE], tl.float32)
    for repeat in range(repeats):
        first = (program + repeat * programs).to(tl.int64) * TILE
        x = tl.load(x_ptr + first + offsets, mask=offsets < count - first, other=0).to(tl.float32)
        squares += x * x
    tl.store(scratch_ptr + 1 + program, tl.sum(squares, axis=0))
    # Releases this program's sum, and acquires the others' where it is the last.
    before = tl.atomic_add(scratch_ptr, 1.0, sem="acq_rel", scope="gpu")
    if before == programs - 1:
        parts = tl.arange(0, PROGRAMS)
        sums = tl.load(scratch_ptr + 1 + parts, mask=parts < programs, other=0, cache_modifier=".cg")
        norm = tl.sqrt_rn(tl.sum(sums, axis=0))
        tl.store(norm_ptr, norm)
        if not norm < float("inf"):
            tl.store(found_inf_ptr, 1.0)
        tl.store(scratch_ptr, 0.0)


def norm_(x: Tensor, norm: Tensor, found_inf: Tensor, scratch: Tensor) -> None:
    """See ``reference.norm_``.

    Args:
        x: contiguous, fp32, bf16 or fp16, not empty; ``norm`` and ``found_inf``: one fp32 element each.
        scratch: of ``make_scratch``, used by one stream.
    """
    count = x.numel()
    tiles = triton.cdiv(count, TILE)
    programs = min(PROGRAMS, tiles)
    repeats = triton.cdiv(tiles, programs)
    _gradient_norm[(programs,)](x, norm, found_inf, scratch, count, repeats, TILE, PROGRAMS, num_warps=NUM_WARPS)
