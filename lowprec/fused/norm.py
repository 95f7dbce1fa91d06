"""RMSNorm by Liger's kernel forward, one read and one write where PyTorch takes about six, and by ours backward.

y = w' x / sqrt(mean(x^2) + eps), with w' = w + offset. Architectures differ in the offset (Gemma: 1) and in where the
product with w' is rounded: Llama rounds x / rms to the model's dtype first, Gemma the whole product last.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lowprec.fused.liger import runs_on
from lowprec.fused.stand_in import replace_forward
from lowprec.ops.rms_norm import rms_norm_backward


class Variant(NamedTuple):
    """How one class of RMSNorm computes."""

    offset: float
    casting: str
    """Liger's word: ``llama`` or ``gemma``."""
    eps: float


def plain_norm(x: torch.Tensor, weight: torch.Tensor, variant: Variant) -> torch.Tensor:
    """The definition, in PyTorch's operations."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + variant.eps)
    if variant.casting == "llama":
        return (variant.offset + weight) * normed.to(x.dtype)
    return (normed * (variant.offset + weight.float())).to(x.dtype)


def recognise(module: nn.Module) -> Variant | None:
    """The variant that gives exactly this module's results in bf16, None where none does."""
    weight = getattr(module, "weight", None)
    eps = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)), None
    )
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if len(list(module.parameters())) > 1 or isinstance(module, nn.LayerNorm):
        return None
    generator = torch.Generator().manual_seed(0)
    # Small numbers, so that eps counts.
    x = 0.01 * torch.randn(4, weight.shape[0], generator=generator, device="cpu").bfloat16()
    trial = torch.randn(weight.shape[0], generator=generator, device="cpu").bfloat16()
    try:
        with torch.no_grad():
            expected = functional_call(module, {"weight": trial}, (x,))
    except (TypeError, RuntimeError, ValueError, AttributeError):  # another kind of module
        return None
    for offset, casting in ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"), (1.0, "llama")):
        variant = Variant(offset, casting, eps)
        if isinstance(expected, torch.Tensor) and torch.equal(plain_norm(x, trial, variant), expected):
            return variant
    return None


class RMSNorm(torch.autograd.Function):
    """``RMSNorm.apply(x, weight, variant)``: keeps x, the weight and one fp32 number a row.

    Liger's own backward writes zeros first, and takes more than twice the time of its bytes: kernels/rms_norm.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, variant: Variant) -> torch.Tensor:
        from liger_kernel.ops import rms_norm as liger

        eps, offset, casting = variant.eps, variant.offset, variant.casting
        y, rows, rstd, *_ = liger.rms_norm_forward(x.contiguous(), weight.contiguous(), eps, offset, casting, None)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        rows, weight, rstd = ctx.saved_tensors
        flat, weight = grad.reshape(rows.shape).contiguous(), weight.contiguous()
        dx, dweight = rms_norm_backward(flat, rows, weight, rstd, ctx.offset, ctx.needs_input_grad[1])
        return dx.view(grad.shape), dweight if ctx.needs_input_grad[1] else None, None


def put_kernel(module: nn.Module, variant: Variant) -> None:
    """Let this one norm compute by the kernels wherever they can run."""

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if not runs_on(hidden_states):
            return type(self).forward(self, hidden_states)
        return RMSNorm.apply(hidden_states, self.weight, variant)

    replace_forward(module, forward)
