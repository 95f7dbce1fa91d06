"""``lowprec::rotate``: block-diagonal Hadamard rotation along an axis of a matrix. It is its own inverse and
transpose."""

import torch
from lowprec_kernels.hadamard import reference

from lowprec.ops.backends import Backend, choose, define, lazily, no_rotation, no_triton


def _no_triton(x: torch.Tensor, block: int, axis: int) -> str | None:
    return "fp64 runs in the reference" if x.dtype == torch.float64 else no_rotation(block) or no_triton(x.device)


BACKENDS = (
    Backend("triton", lazily("hadamard.triton_kernel", "rotate"), _no_triton),
    Backend("reference", reference.rotate),
)


def _run(x: torch.Tensor, block: int, axis: int = -1) -> torch.Tensor:
    return x.clone() if block == 1 else choose(BACKENDS, x, block, axis).run(x, block, axis)


rotate = define(
    "rotate(Tensor x, int block, int axis=-1) -> Tensor", _run, lambda x, block, axis=-1: torch.empty_like(x)
)
"""``rotate(x, block, axis=-1)``: ``x [rows, dim]`` rotated along ``axis`` (0 or -1) in blocks of ``block``, a power
of two."""


def _setup(ctx, inputs: tuple, output: torch.Tensor) -> None:
    _, ctx.block, ctx.axis = inputs


def _backward(ctx, grad: torch.Tensor) -> tuple:
    return rotate(grad.contiguous(), ctx.block, ctx.axis), None, None


torch.library.register_autograd("lowprec::rotate", _backward, setup_context=_setup)
