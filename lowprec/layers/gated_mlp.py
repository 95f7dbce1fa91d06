"""A gated MLP of trained ``fp8`` layers, Y = (a(X Wg^T) * (X Wu^T)) Wd^T + b, with what lies between its products cast
where it is computed.

Layer by layer X is cast twice, and H, dG and dU are written in 16 bits to be read again by their casts. Here

    forward     q(X) once; G = q(X) q(Wg)^T and U = q(X) q(Wu)^T in 16 bits; q(H) from G and U; Y = q(H) q(Wd)^T + b
    backward    of Y: dH and the gradient of Wd; q(dG) and q(dU) from dH, G and U; E_X = q(dG) q(Wg) + q(dU) q(Wu),
                summed in place; the gradients of Wg and Wu from q(dG), q(dU) and q(X), which is transposed once

The kernels round H, dG and dU to 16 bits before they cast them: results and gradients are, bit for bit, those of the
layers one by one around Liger's kernel. Kept for backward: q(X) once, G, U, q(H) and what the layers keep of weights.

Two autograd functions and not one: the gradient of Wd is complete, and may be used up and freed by its hooks, before
the others are computed. Between them goes a tensor of H's shape without contents, whose gradient is dH.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowprec.layers.eight_bit import (
    Codes,
    SharedInput,
    TrainedOperands,
    forward_product,
    in_autocast_dtype,
    input_gradient,
    operand_from_kept,
    shared_weight_gradient,
    weight_for_backward,
)
from lowprec.layers.eight_bit_functions import trained_product
from lowprec.layers.eight_bit_linear import TrainedEightBitLinear
from lowprec.layers.products import Plan
from lowprec.ops import quantize_gated, quantize_gated_gradients, transpose_codes


def why_not(gate: nn.Module, up: nn.Module, down: nn.Module) -> str | None:
    """Why the layers are computed one by one, in words for the report; None where they can be computed together."""
    for name, layer in (("gate", gate), ("up", up), ("down", down)):
        if not isinstance(layer, TrainedEightBitLinear):
            return f"its {name} layer is a {type(layer).__name__}"
        if not layer.plan.is_plain:
            return f"not all products of its {name} layer are plain e4m3 ones: row scales, no rotation"
        if name != "down" and layer.bias is not None:
            return f"its {name} layer has a bias, whose gradient needs the errors in 16 bits"
    return None


def takes(gate: nn.Module, up: nn.Module, down: nn.Module) -> bool:
    """Whether ``gated_mlp`` computes what a call of each layer would now: adapters may have been put in their places,
    hooks on them, and an evaluation takes 16-bit weights. Compiled, they are left to the compiler one by one."""
    if torch.compiler.is_compiling() or why_not(gate, up, down) is not None:
        return False
    return not any(_is_watched(layer) or layer.is_evaluated for layer in (gate, up, down))  # type: ignore[operator]


def gated_mlp(
    x: torch.Tensor,
    gate: TrainedEightBitLinear,
    up: TrainedEightBitLinear,
    down: TrainedEightBitLinear,
    kind: str,
) -> torch.Tensor:
    """``x [..., in]`` to ``[..., out]`` in the dtype of ``x``, or in autocast's where that is on. Call it where
    ``takes`` says so.

    Args:
        kind: ``SwiGLU`` or ``GeGLU``.
    """
    operands, plans = (gate.operands(), up.operands()), (gate.plan, up.plan)
    flat = x.reshape(-1, gate.in_features)
    place, *codes = _GatedProduct.apply(flat, gate.weight, up.weight, operands, plans, kind)
    y = trained_product(place, down.weight, down.bias, down.operands(), down.plan, Codes(*codes))
    return y.reshape(*x.shape[:-1], down.out_features)


class _GatedProduct(torch.autograd.Function):
    """X ``[tokens, in]`` to a place for H ``[tokens, inner]``, which has no contents, and the codes of H."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        gate_weight: torch.Tensor,
        up_weight: torch.Tensor,
        operands: tuple[TrainedOperands, TrainedOperands],
        plans: tuple[Plan, Plan],
        kind: str,
    ):
        inputs = SharedInput(in_autocast_dtype(x))
        gate, up = (
            forward_product(inputs.codes(plan), mine.forward, None, plan, inputs.x.dtype)
            for mine, plan in zip(operands, plans, strict=True)
        )
        codes = quantize_gated(gate, up, kind)
        wants_x, *wants_weights = ctx.needs_input_grad[:3]
        kept = inputs.codes(plans[0]) if any(wants_weights) else (None, None)
        weights = [
            weight_for_backward(weight, mine, plan) if wants_x else (None, None)
            for weight, mine, plan in zip((gate_weight, up_weight), operands, plans, strict=True)
        ]
        ctx.save_for_backward(gate, up, *kept, *weights[0], *weights[1])
        ctx.plans, ctx.kind, ctx.cached = plans, kind, [mine.backward is not None for mine in operands]
        ctx.x_dtype, ctx.weight_dtypes = x.dtype, (gate_weight.dtype, up_weight.dtype)
        ctx.mark_non_differentiable(*codes)
        ctx.set_materialize_grads(False)  # those of the codes would be as large
        return gate.new_empty_strided(gate.shape, (0, 0)), *codes

    @staticmethod
    @once_differentiable
    def backward(ctx, error, *of_codes):
        if error is None:
            return (None,) * 6
        gate, up, x_codes, x_scale, *weights = ctx.saved_tensors
        found = quantize_gated_gradients(error.contiguous(), gate, up, ctx.kind, x_scale)
        errors = (Codes(*found[:2]), Codes(*found[2:]))
        grad_x = None
        if ctx.needs_input_grad[0]:
            for rows, kept, cached, plan in zip(errors, (weights[:2], weights[2:]), ctx.cached, ctx.plans, strict=True):
                operand = operand_from_kept(tuple(kept), cached, plan)
                part = input_gradient(rows, operand, plan, gate.shape[0], gate.dtype)
                grad_x = part.to(ctx.x_dtype) if grad_x is None else grad_x.add_(part)
        columns = None if x_codes is None else transpose_codes(x_codes)
        grads = [
            shared_weight_gradient(rows, x_scale, columns, plan, dtype) if wanted else None
            for wanted, rows, plan, dtype in zip(
                ctx.needs_input_grad[1:3], errors, ctx.plans, ctx.weight_dtypes, strict=True
            )
        ]
        return grad_x, *grads, None, None, None


def _is_watched(layer: nn.Module) -> bool:
    """Whether a call of the layer does more than its class's ``forward``."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)
