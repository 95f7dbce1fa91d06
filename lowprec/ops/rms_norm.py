"""``lowprec::rms_norm_backward``: the gradients of an RMSNorm, in one pass over its rows."""

import torch
from lowprec_kernels.rms_norm import LONGEST_ROW, reference

from lowprec.ops.backends import Backend, choose, define, lazily, no_triton


def _no_triton(grad, x, weight, rstd, offset, weight_grad) -> str | None:
    if x.shape[-1] > LONGEST_ROW:
        return f"a row of {x.shape[-1]} is longer than {LONGEST_ROW}"
    if x.dtype == torch.float64:
        return "fp64 runs in the reference"
    if not all(tensor.is_contiguous() for tensor in (grad, x, weight, rstd)):
        return "the operands are not contiguous"
    return no_triton(x.device)


BACKENDS = (
    Backend("triton", lazily("rms_norm.triton_kernel", "rms_norm_backward"), _no_triton),
    Backend("reference", reference.rms_norm_backward),
)


def _run(*arguments):
    return choose(BACKENDS, *arguments).run(*arguments)


def _fake(grad, x, weight, rstd, offset, weight_grad):
    return torch.empty_like(x), torch.empty_like(weight) if weight_grad else weight.new_empty(0)


rms_norm_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float offset, bool weight_grad)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
)
"""``rms_norm_backward(grad, x, weight, rstd, offset, weight_grad)``: gradients of ``x`` ``[rows, dim]`` and ``weight``
``[dim]``, the latter empty where it is not wanted; see the reference."""
