"""Gated MLPs with Liger's product: down(act(gate(x)) * up(x)), where act(gate) * up is one kernel.

The linear layers stay what they are and where they are: 8-bit, 4-bit, with adapters. The kernel keeps gate and up for
backward and computes the activation again; PyTorch keeps four tensors of that size. Where all three layers are trained
ones of plain ``fp8``, kernels of our own give the product as codes, with the same results
(``lowprec.layers.gated_mlp``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from lowprec.fused.liger import runs_on
from lowprec.fused.stand_in import random_linear, replace_forward, stand_in
from lowprec.layers import gated_mlp
from lowprec.layers.eight_bit_linear import TrainedEightBitLinear

_HIDDEN, _INNER = 4, 8


def _silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


PLAIN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"SwiGLU": _silu, "GeGLU": _gelu}
"""Name -> the definition."""


class Variant(NamedTuple):
    """How one class of MLP computes."""

    product: str
    """``SwiGLU`` or ``GeGLU``."""
    joined: bool
    """Whether one layer gives gate and up, one after the other."""


def recognise(module: nn.Module) -> Variant | None:
    """The variant whose results are this module's, None where none is."""
    children = dict(module.named_children())
    joined = {"gate_up_proj", "down_proj"} <= set(children)
    if not joined and not {"gate_proj", "up_proj", "down_proj"} <= set(children):
        return None
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules()):
        return None
    generator = torch.Generator().manual_seed(0)
    gate, up = (random_linear(_INNER, _HIDDEN, generator) for _ in range(2))
    down = random_linear(_HIDDEN, _INNER, generator)
    small: dict[str, nn.Module] = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    if joined:
        both = random_linear(2 * _INNER, _HIDDEN, generator)
        both.weight = nn.Parameter(torch.cat([gate.weight, up.weight]), requires_grad=False)
        small = {"gate_up_proj": both, "down_proj": down}
    x = torch.randn(2, 3, _HIDDEN, generator=generator, device="cpu")
    try:
        with torch.no_grad():
            expected = stand_in(module, small)(x)
    except Exception:  # whatever another kind of module's forward raises
        return None
    for name, product in PLAIN.items():
        found = down(product(gate(x), up(x)))
        if isinstance(expected, torch.Tensor) and found.shape == expected.shape and torch.allclose(
            found, expected, rtol=1e-5, atol=1e-5
        ):  # fmt: skip
            return Variant(name, joined)
    return None


def put_kernel(module: nn.Module, variant: Variant) -> None:
    """Let this one MLP multiply gate and up by Liger's kernel wherever it can run."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction

    kernel: Any = {"SwiGLU": LigerSiLUMulFunction, "GeGLU": LigerGELUMulFunction}[variant.product]
    put_product(module, variant, lambda gate, up: kernel.apply(gate, up), runs_on)


def put_product(
    module: nn.Module,
    variant: Variant,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    runs: Callable[[torch.Tensor], bool] = lambda x: True,
) -> None:
    """Let this one MLP multiply gate and up by ``product``, or with its layers' casts, for inputs that ``runs`` takes;
    others are left to the class."""

    def separate(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not runs(x):
            return type(self).forward(self, x)
        layers = self.gate_proj, self.up_proj, self.down_proj
        if gated_mlp.takes(*layers):
            return gated_mlp.gated_mlp(x, *layers, variant.product)
        return self.down_proj(product(self.gate_proj(x), self.up_proj(x)))

    def joined(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if not runs(hidden_states):
            return type(self).forward(self, hidden_states)
        # The kernel wants whole rows: two copies here, which its one pass still makes up for.
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(product(gate, up))

    replace_forward(module, joined if variant.joined else separate)


def why_casts_apart(module: nn.Module, variant: Variant) -> str | None:
    """Why 8-bit layers of this MLP cast by themselves, in words for the report: None where their casts are part of the
    product's kernels, empty where no layer is trained in 8 bits, so that there is nothing to say."""
    layers = [layer for name, layer in module.named_children() if name.endswith("_proj")]
    if not any(isinstance(layer, TrainedEightBitLinear) for layer in layers):
        return ""
    if variant.joined:
        return "one layer gives gate and up"
    return gated_mlp.why_not(*(getattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")))
