"""``lowprec::rotate``: block-diagonal Hadamard rotation along an axis of a matrix. It is its own inverse and transpose."""

import torch
from lowprec_kernels.hadamard import reference

from lowprec.ops.backends import Backend, choose, lazily, no_triton


def _no_triton(x: torch.Tensor, block: int, axis: int) -> str | None:
    if not 16 <= block <= 256:
        return f"a block of {block} is outside the 16 to 256 of the tensor cores' product"
    if x.dtype == torch.float64:
        return "fp64 runs in the reference"
    return no_triton(x.device)


BACKENDS = (
    Backend("triton", lazily("hadamard.triton_kernel", "rotate"), _no_triton),
    Backend("reference", reference.rotate),
)


@torch.library.custom_op("lowprec::rotate", mutates_args=())
def rotate(x: torch.Tensor, block: int, axis: int = -1) -> torch.Tensor:
    """``x [rows, dim]`` rotated along ``axis`` (0 or -1) in blocks of ``block`` (a power of two); same shape and dtype."""
    if block == 1:
        return x.clone()
    return choose(BACKENDS, x, block, axis).run(x, block, axis)


@rotate.register_fake
def _(x: torch.Tensor, block: int, axis: int = -1) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs: tuple, output: torch.Tensor) -> None:
    _, ctx.block, ctx.axis = inputs


def _backward(ctx, grad: torch.Tensor) -> tuple:
    return torch.ops.lowprec.rotate(grad.contiguous(), ctx.block, ctx.axis), None, None


rotate.register_autograd(_backward, setup_context=_setup)
