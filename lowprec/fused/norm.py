"""RMSNorm by Liger's kernel: one read and one write forward, where PyTorch takes about six.

y = w' x / sqrt(mean(x^2) + eps), with w' = w + offset. Architectures differ in the offset (Gemma: 1) and in where the
product with w' is rounded: Llama rounds x / rms to the model's dtype first, Gemma the whole product last.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from lowprec.fused.liger import runs_on
from lowprec.fused.stand_in import replace_forward


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


def put_kernel(module: nn.Module, variant: Variant) -> None:
    """Let this one norm compute by Liger's kernel wherever it can run."""
    from liger_kernel.ops import LigerRMSNormFunction

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if not runs_on(hidden_states):
            return type(self).forward(self, hidden_states)
        # Not in place: a gradient that arrives may belong to a residual branch as well.
        return LigerRMSNormFunction.apply(
            hidden_states, self.weight, variant.eps, variant.offset, variant.casting, False, None
        )

    replace_forward(module, forward)
