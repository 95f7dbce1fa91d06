"""LoRA over frozen bases for all projections of one input, as one autograd function.

Shapes: X [tokens, in], W_i [out_i, in], A_i [r_i, in], B_i [out_i, r_i], E_i = dL/dY_i; A is the A_i stacked, R = sum
of the r_i, s_i = alpha_i / r_i.

    L_i = s_i X A_i^T                               [tokens, R], one product for all
    Y_i = X W_i^T + b_i + L_i B_i^T                 the last term by the product itself in 8 bits, else in place
    P_i = s_i E_i B_i                               [tokens, R]
    E_X = sum_i E_i W_i + P A                       summed in place
    dA  = P^T X        dB_i = E_i^T L_i             one product for all dA

Kept for backward: X, once for the group, and L (R/in of X). Bases keep nothing: they are frozen, so what they hold at
backward is what they held at forward. The association (X A^T) B^T, the additions in place and the one saved input are
what unsloth does for the same layers; X is quantised once for the group where bases multiply in 8 bits.

Two autograd functions, one after the other, share this: ``_Keep`` computes L, keeps what backward needs, and has the
gradients; ``_Fill`` computes the Y_i and keeps nothing. Where a layer is computed again for backward, PyTorch stops at
the last tensor that backward needs: so the products of a layer's last projection (a quarter of those of a Llama's) are
not repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(slots=True)
class _Work:
    """What ``_Keep`` leaves for ``_Fill``."""

    projections: Sequence[Projection]
    x: torch.Tensor
    """``[tokens, in]``"""
    low: torch.Tensor
    """L ``[tokens, R]``"""
    b: Sequence[torch.Tensor]
    """The B_i, in the dtype of X where a base would cast them one by one."""


def project(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """``x [..., in]`` to one ``[..., out_i]`` for each projection, all in the dtype of ``x``; A and B are cast to it.

    Gradients of A, B and the biases have the dtypes of the parameters.
    """
    work: list[_Work] = []
    tensors = [tensor for p in projections for tensor in (p.a, p.b, p.bias)]
    places = _Keep.apply(x, projections, work, *tensors)
    return _Fill.apply(work.pop(), *places)


class _Keep(torch.autograd.Function):
    """X, A, B and the biases to places for the Y_i: of their shapes, without contents."""

    @staticmethod
    def forward(ctx: Any, x, projections, work, *tensors):
        a, b = tensors[0::3], tensors[1::3]
        flat = x.reshape(-1, x.shape[-1])
        ctx.scalings = [p.scaling for p in projections]
        ctx.ranks = [a_i.shape[0] for a_i in a]
        as_they_are = all(bases.casts_up(p.base, r, flat) for p, r in zip(projections, ctx.ranks, strict=True))
        a_cast, b_cast = _cast(a, () if as_they_are else b, x.dtype)
        low = _small_product(flat, a_cast, ctx.ranks, ctx.scalings)
        ctx.save_for_backward(x, low)
        # Not saved: they outlive the graph, and each tensor saved costs a checkpoint three calls of hooks on the host.
        ctx.parameters, ctx.versions = (a, b), [t._version for t in (*a, *b)]
        ctx.bases = [p.base for p in projections]
        ctx.bias_dtypes = [None if p.bias is None else p.bias.dtype for p in projections]
        ctx.set_materialize_grads(False)
        work.append(_Work(projections, flat, low, b if as_they_are else b_cast))
        shapes = [(*x.shape[:-1], b_i.shape[0]) for b_i in b]
        return tuple(x.new_empty_strided(shape, (0,) * x.ndim) for shape in shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given):
        x, low = ctx.saved_tensors
        count = len(ctx.bases)
        a, b = ctx.parameters
        if ctx.versions != [t._version for t in (*a, *b)]:
            raise RuntimeError("A or B of a LoRA layer was modified by an inplace operation after its forward.")
        needs = ctx.needs_input_grad
        wants_a = any(needs[3::3])
        flat = x.reshape(-1, x.shape[-1])
        errors = [None if e is None else e.reshape(-1, e.shape[-1]).contiguous() for e in given]
        a_cast, b_cast = _cast(a, b, x.dtype)
        lifted = flat.new_empty(low.shape)
        parts, lows = lifted.split(ctx.ranks, 1), low.split(ctx.ranks, 1)
        gradients: list[torch.Tensor | None] = [None] * (3 * count)
        for i, error in enumerate(errors):
            if error is None:
                parts[i].zero_()
                continue
            torch.addmm(parts[i], error, b_cast[i], beta=0, alpha=ctx.scalings[i], out=parts[i])
            if needs[3 + 3 * i + 1]:
                gradients[3 * i + 1] = _product_as(b[i].dtype, error.t(), lows[i])
            if needs[3 + 3 * i + 2]:
                gradients[3 * i + 2] = error.sum(0, dtype=_wide(error.dtype)).to(ctx.bias_dtypes[i])
        if wants_a:
            grad_a = _product_as(a[0].dtype, lifted.t(), flat)
            for i, part in enumerate(grad_a.split(ctx.ranks)):
                if needs[3 + 3 * i] and errors[i] is not None:
                    gradients[3 * i] = part.to(a[i].dtype)
        shape, grad_x = x.shape, None
        del x, flat  # in a checkpoint nobody else holds it: an MLP's largest tensor goes before its gradient comes
        if needs[0]:
            for base, error in zip(ctx.bases, errors, strict=True):
                grad_x = grad_x if error is None else bases.add_gradient(base, error, grad_x)
        if grad_x is not None:
            grad_x = grad_x.addmm_(lifted, a_cast).view(shape)
        return grad_x, None, None, *gradients


class _Fill(torch.autograd.Function):
    """The Y_i in their places. Their gradients go to ``_Keep`` as they come."""

    @staticmethod
    def forward(ctx: Any, work, *places):
        ctx.set_materialize_grads(False)
        inputs = SharedInput(work.x)
        ranks = [p.a.shape[0] for p in work.projections]
        outputs = []
        for p, place, low, b in zip(work.projections, places, work.low.split(ranks, 1), work.b, strict=True):
            outputs.append(bases.product(p.base, inputs, p.bias, low, b).view(place.shape))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *errors):
        return None, *errors


def _small_product(x: torch.Tensor, a: torch.Tensor, ranks: list[int], scalings: list[float]) -> torch.Tensor:
    """L: each s_i X A_i^T, side by side."""
    if len(set(scalings)) == 1:
        low = x.new_empty(x.shape[0], a.shape[0])
        return torch.addmm(low, x, a.t(), beta=0, alpha=scalings[0], out=low)
    low = x @ a.t()
    for part, scaling in zip(low.split(ranks, 1), scalings, strict=True):
        part.mul_(scaling)
    return low


def _cast(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A stacked ``[R, in]``, and the B_i, in ``dtype``: one kernel for all of them on a GPU."""
    stacked = torch.empty(sum(a_i.shape[0] for a_i in a), a[0].shape[1], dtype=dtype, device=a[0].device)
    cast = [torch.empty_like(b_i, dtype=dtype, memory_format=torch.contiguous_format) for b_i in b]
    torch._foreach_copy_([*stacked.split([a_i.shape[0] for a_i in a]), *cast], [*a, *b])
    return stacked, cast


def _product_as(dtype: torch.dtype, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product in ``dtype``. cuBLAS writes its fp32 sums as they are, without rounding them to 16 bits first."""
    # Tensors without data (lowprec.plan) are of another class: not every PyTorch knows the shape of this product.
    if dtype == torch.float32 and left.is_cuda and left.dtype.itemsize == 2 and type(left) is torch.Tensor:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
