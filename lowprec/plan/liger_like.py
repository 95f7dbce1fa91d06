"""Stand-ins for Liger's kernels, and for ours of the norm's gradients, over tensors without data: they allocate and
keep what those do, and compute nothing. Where they go is decided as ``lowprec.fused`` decides it; MLPs whose layers'
casts are part of their product run as they are, since its operators know what they return."""

from types import FunctionType
from typing import Any

import torch
from lowprec_kernels.rms_norm import num_programs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowprec.fused import mlp, norm, rope
from lowprec.fused.stand_in import replace_forward
from lowprec.fused.surgery import _candidates as find_parts


def put_liger_like(model: nn.Module, sm_count: int) -> None:
    """Give the parts of this one model that Liger's kernels would compute their stand-ins."""
    with unset_fake_temporarily():  # parts are recognised by trials on small numbers, which have to be there
        parts = find_parts(model)
        norms = [(module, norm.recognise(module)) for module in parts["norm"]]
        mlps = [(module, mlp.recognise(module)) for module in parts["mlp"]]
        attentions = [module for module in parts["rope"] if rope.recognise(module)]
    for module, variant in norms:
        if variant is not None:
            replace_forward(module, lambda self, x: _Norm.apply(x, self.weight, sm_count))
    for module, found in mlps:
        if found is not None:
            mlp.put_product(module, found, _Gated.apply)
    for module in attentions:
        in_place = all(isinstance(getattr(module, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj"))
        replace_forward(module, _with_stand_in(type(module), in_place))


def _with_stand_in(kind: Any, in_place: bool) -> FunctionType:
    plain = rope._code(kind)
    assert plain is not None
    own = plain.__globals__[rope.NAME]

    def turned(q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **named: Any) -> Any:
        if rest or named or cos.shape[-1] != q.shape[-1]:
            return own(q, k, cos, sin, *rest, **named)
        if not in_place:
            q, k = q.clone(), k.clone()
        return _Rope.apply(q, k, cos, sin)

    forward = FunctionType(
        plain.__code__, plain.__globals__ | {rope.NAME: turned}, plain.__name__, plain.__defaults__, plain.__closure__
    )
    forward.__kwdefaults__ = plain.__kwdefaults__
    return forward


class _Norm(torch.autograd.Function):
    """Keeps X, W and one fp32 a row; backward makes E_X, and partial sums of G where the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sm_count: int) -> Tensor:
        x = x.contiguous()
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(rows).copy_(rows)  # the traffic of the kernel: one read, one write
        ctx.save_for_backward(rows, weight, torch.empty(rows.shape[0], dtype=torch.float32, device=x.device))
        ctx.sm_count = sm_count
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple:  # type: ignore[override]
        rows, weight, _ = ctx.saved_tensors
        error = error.contiguous()
        grad = torch.add(rows, error.view(rows.shape), out=torch.empty_like(rows))
        if not ctx.needs_input_grad[1]:
            return grad.view(error.shape), None, None
        count, dim = rows.shape
        sums = torch.empty(num_programs(count, dim, ctx.sm_count), dim, dtype=torch.float32, device=rows.device)
        return grad.view(error.shape), torch.sum(sums, 0, out=torch.empty_like(weight)), None


class _Gated(torch.autograd.Function):
    """Keeps gate and up, and backward writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.mul(gate, up, out=torch.empty_like(gate))

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple:  # type: ignore[override]
        error = error.contiguous()
        gate, up = ctx.saved_tensors
        return gate.mul_(error).view(gate.shape), up.mul_(error).view(up.shape)


class _Rope(torch.autograd.Function):
    """Turns queries and keys in place where each token's heads lie together, as products leave them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple:
        q, k = (x.transpose(1, 2).contiguous().mul_(1).transpose(1, 2) for x in (q, k))
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return q, k

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple:  # type: ignore[override]
        dq, dk = (x.transpose(1, 2).contiguous().mul_(1).transpose(1, 2) for x in (dq, dk))
        return dq, dk, None, None
