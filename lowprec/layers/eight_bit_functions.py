"""Linear layers with 8-bit products as autograd functions: of weights that train, and of weights that are stored as
codes. Shapes and pieces: eight_bit.py."""

import torch
from torch.autograd.function import once_differentiable

from lowprec.layers.eight_bit import (
    Codes,
    TrainedOperands,
    error_codes,
    forward_product,
    frozen_transposed_weight,
    input_codes,
    input_for_backward,
    input_gradient,
    operand_from_kept,
    weight_for_backward,
    weight_gradient,
)
from lowprec.layers.products import Plan


def trained_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    operands: TrainedOperands,
    plan: Plan,
    x_codes: Codes | None = None,
) -> torch.Tensor:
    """Y = X W^T + b, ``[tokens, out]`` in the dtype of ``x [tokens, in]``, for a ``weight [out, in]`` that trains.

    With ``x_codes`` given (``plan.shares_input``), those are multiplied, and of ``x`` only shape and dtype count: its
    gradient has them.
    """
    none = (None, None)
    return TrainedProduct.apply(
        x, weight, bias, *operands.forward, *(operands.backward or none), *(x_codes or none), plan
    )


class TrainedProduct(torch.autograd.Function):
    """Y = X W^T + b with both gradients in 8 bits. Kept for backward: the codes of X and of W, 1 byte an element."""

    @staticmethod
    def forward(
        ctx, x, weight, bias, weight_forward, weight_scale, weight_backward, backward_scale, codes, x_scale, plan
    ):
        backward = None if weight_backward is None else Codes(weight_backward, backward_scale)
        operands = TrainedOperands(Codes(weight_forward, weight_scale), backward)
        x_codes = input_codes(x, plan) if codes is None else Codes(codes, x_scale)
        y = forward_product(x_codes, operands.forward, bias, plan, x.dtype)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        kept = input_for_backward(x, x_codes, plan) if wants_weight else ()
        ctx.save_for_backward(*(weight_for_backward(weight, operands, plan) if wants_x else (None, None)), *kept)
        ctx.plan, ctx.cached, ctx.tokens = plan, backward is not None, x.shape[0]
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, error):
        first, second, *kept = ctx.saved_tensors
        plan, error = ctx.plan, error.contiguous()
        grad_x = grad_weight = grad_bias = rows = None
        if ctx.needs_input_grad[0]:
            rows = error_codes(error, plan, tuple(kept) or None)
            operand = operand_from_kept((first, second), ctx.cached, plan)
            grad_x = input_gradient(rows, operand, plan, ctx.tokens, ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(error, rows, tuple(kept), plan, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = error.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None, None


class FrozenProduct(torch.autograd.Function):
    """Y = X W^T + b and the input gradient in 8 bits, for weights that are stored as codes. Nothing is kept of X."""

    @staticmethod
    def forward(ctx, x, bias, weight_forward, weight_scale, weight_backward, backward_scale, factor, plan):
        y = forward_product(input_codes(x, plan), Codes(weight_forward, weight_scale), bias, plan, x.dtype)
        both = weight_backward is not None
        mine = (weight_backward, None) if both else (weight_forward, weight_scale)
        ctx.save_for_backward(*mine, backward_scale, factor)
        ctx.plan, ctx.both, ctx.tokens, ctx.x_dtype = plan, both, x.shape[0], x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, error):
        plan, error = ctx.plan, error.contiguous()
        codes, scale, backward_scale, factor = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.both:
                codes = Codes(codes, backward_scale)
            else:
                codes = frozen_transposed_weight(Codes(codes, scale), backward_scale, factor, plan)
            grad_x = input_gradient(error_codes(error, plan, None), codes, plan, ctx.tokens, ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = error.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None, None
