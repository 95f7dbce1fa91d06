"""NF4: frozen weights in 4 bits by bitsandbytes, the base of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

A block of ``block_size`` weights shares one scale, its largest magnitude; each weight becomes the nearest of 16 levels,
quantiles of a normal distribution. ``double_quant`` stores those scales in 8 bits, 256 of them to a second scale.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lowprec.errors import UserError
from lowprec.option import option

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


@option("weights", "nf4")
@dataclass(kw_only=True, slots=True)
class NF4:
    """Frozen linear layers in 4 bits (at block size 64: 4.13 bits a weight with double quantisation, 4.5 without)."""

    option_name: ClassVar[str]

    block_size: int = 64
    """Weights that share a scale."""
    double_quant: bool = True
    """Quantise the scales too: 0.37 bits a weight less at block size 64."""

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            choices = ", ".join(map(str, BLOCK_SIZES))
            raise UserError(f"weights.block_size={self.block_size} is not one of {choices}.")

    def why_not(self, linear: nn.Linear, frozen: bool) -> str | None:
        if getattr(linear.weight, "quant_state", None) is not None:
            return "already 4-bit in the model's files"
        if not frozen:
            return "trained: a 4-bit weight cannot take gradient steps"
        if linear.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its weight is {linear.weight.dtype}, which bitsandbytes does not quantise"
        return None

    def convert(self, linear: nn.Linear, frozen: bool) -> nn.Linear:
        reason = self.why_not(linear, frozen)
        assert reason is None, reason
        from lowprec.layers.nf4_linear import NF4Linear  # bitsandbytes takes seconds to import

        return NF4Linear(linear, self.block_size, self.double_quant)

    def kernel(self, linear: nn.Linear) -> str:
        return f"bitsandbytes gemm_4bit ({linear.weight.device.type})"
