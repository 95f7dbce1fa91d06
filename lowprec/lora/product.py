"""LoRA over frozen bases for all projections of one input, as one autograd function.

Shapes: X [tokens, in], W_i [out_i, in], A_i [r_i, in], B_i [out_i, r_i], E_i = dL/dY_i; A is the A_i stacked, R = sum
of the r_i, s_i = alpha_i / r_i.

    L   = X A^T                                     [tokens, R], one product for all
    Y_i = X W_i^T + b_i + s_i L_i B_i^T             the second term added in place
    P_i = s_i E_i B_i                               [tokens, R]
    E_X = sum_i E_i W_i + P A                       summed in place
    dA  = P^T X        dB_i = s_i E_i^T L_i         one product for all dA

Kept for backward: X, once for the group, and L (R/in of X). Bases keep nothing: they are frozen, so what they hold at
backward is what they held at forward. The association (X A^T) B^T, the additions in place and the one saved input are
what unsloth does for the same layers; X is quantised once for the group where bases multiply in 8 bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowprec.layers.eight_bit import SharedInput
from lowprec.lora import bases


class Projection(NamedTuple):
    """One projection of a group. Tensors that may be trained are apart: autograd must see them."""

    base: nn.Module
    scaling: float
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None


def project(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """``x [..., in]`` to one ``[..., out_i]`` for each projection, all in the dtype of ``x``; A and B are cast to it.

    Gradients of A, B and the biases have the dtypes of the parameters.
    """
    tensors = [tensor for p in projections for tensor in (p.a, p.b, p.bias)]
    return _Project.apply(x, [(p.base, p.scaling) for p in projections], *tensors)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, layers, *tensors):
        a, b, biases = tensors[0::3], tensors[1::3], tensors[2::3]
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ _stacked(a, x.dtype).t()
        inputs = SharedInput(flat)
        outputs = []
        ranks = [a_i.shape[0] for a_i in a]
        for (base, scaling), b_i, bias, low_i in zip(layers, b, biases, low.split(ranks, 1), strict=True):
            y = bases.product(base, inputs, bias)
            y.addmm_(low_i, b_i.to(y.dtype).t(), alpha=scaling)
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(x, low, *a, *b)
        ctx.layers, ctx.ranks = layers, ranks
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given):
        x, low, *tensors = ctx.saved_tensors
        count = len(ctx.layers)
        a, b = tensors[:count], tensors[count:]
        needs = ctx.needs_input_grad
        flat = x.reshape(-1, x.shape[-1])
        errors = [None if e is None else e.reshape(-1, e.shape[-1]).contiguous() for e in given]
        lifted = flat.new_empty(flat.shape[0], sum(ctx.ranks))
        gradients: list[torch.Tensor | None] = [None] * (3 * count)
        grad_x = None
        for i, ((base, scaling), error) in enumerate(zip(ctx.layers, errors, strict=True)):
            begin = sum(ctx.ranks[:i])
            part, low_i = (t[:, begin : begin + ctx.ranks[i]] for t in (lifted, low))
            if error is None:
                part.zero_()
                continue
            torch.addmm(part, error, b[i].to(error.dtype), beta=0, alpha=scaling, out=part)
            if needs[0]:
                grad_x = bases.add_gradient(base, error, grad_x)
            if needs[2 + 3 * i + 1]:
                gradients[3 * i + 1] = (error.t() @ low_i).mul_(scaling).to(b[i].dtype)
            if needs[2 + 3 * i + 2]:
                gradients[3 * i + 2] = error.sum(0, dtype=_wide(error.dtype)).to(ctx.bias_dtypes[i])
        if any(needs[2::3]):
            grad_a = lifted.t() @ flat
            for i, part in enumerate(grad_a.split(ctx.ranks)):
                if needs[2 + 3 * i] and errors[i] is not None:
                    gradients[3 * i] = part.to(a[i].dtype)
        if grad_x is not None:
            grad_x = grad_x.addmm_(lifted, _stacked(a, x.dtype)).view(x.shape)
        return grad_x, None, *gradients


def _stacked(a: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return (a[0] if len(a) == 1 else torch.cat(list(a))).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
