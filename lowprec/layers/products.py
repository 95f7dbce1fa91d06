"""The three products of a linear layer in 8 bits, and what of each is rotated, quantised and saved.

    forward           Y   = X W^T       sums over the layer's inputs  ("in")
    input gradient    E_X = E_Y W       sums over its outputs         ("out")
    weight gradient   G   = E_Y^T X     sums over the tokens          ("tokens")

q() is a cast with a scale for each row along the sum ("row") or one for the whole matrix ("tensor"); H is a
block-diagonal Hadamard matrix. A rotation of the axis that is summed over cancels by itself, of another axis it is
undone on the result:

    forward           none  q(X) q(W)^T               in      q(X H) q(W H)^T
    input gradient    none  q(E) q(W)                 out     q(E H) q(H^T W)
                      in    [q(E) q(W H)] H^T         tokens  H [q(H^T E) q(W)]      tokens+in  both
    weight gradient   none  q(E)^T q(X)               tokens  q(H^T E)^T q(H^T X)
                      in    [q(E)^T q(X H)] H^T

Where two products need one operand with the same rotation, it is quantised once (``shares_input``, ``shares_weight``):
a tensor scale survives transposition, and row scales of e4m3 codes fold into the other operand's as powers of two.
"""

from dataclasses import dataclass

import torch
from lowprec_kernels.hadamard.reference import LARGEST_BLOCK, rotation_block

from lowprec.errors import UserError

FP8 = torch.float8_e4m3fn
WIDE_BLOCK = 256
"""Inputs of down projections have the largest outliers: in SmolLM2 a channel of 36 among others of 0.7. Blocks of 256
instead of 64 take the 1st percentile token of the worst one from 33.8 to 34.6 dB in int8; 128 takes it to 33.6."""

GRADIENT_BLOCK = 32
"""Order of rotations over outputs and tokens. A column cast at order 32 runs at 83 % of the copy bandwidth, at order
128 at 46 % (H100, 8192 x 14336); on SmolLM2 it is also the most accurate for weight gradients (docs/eight_bit.md)."""

ROTATIONS = {
    "forward": ("none", "in"),
    "input_gradient": ("none", "out", "in", "tokens", "tokens+in"),
    "weight_gradient": ("none", "tokens", "in"),
}


@dataclass(kw_only=True, slots=True)
class Product:
    """How one product is computed."""

    rotate: str = "none"
    """The axis that is rotated: see the table above."""
    scale: str = "row"
    """``row`` or ``tensor``."""

    def check(self, name: str) -> None:
        if self.rotate not in ROTATIONS[name]:
            raise UserError(f"weights.{name}.rotate={self.rotate!r} is not one of {', '.join(ROTATIONS[name])}.")
        if self.scale not in ("row", "tensor"):
            raise UserError(f"weights.{name}.scale={self.scale!r} is not one of row, tensor.")


@dataclass(kw_only=True, slots=True)
class WeightGradient(Product):
    """How the weight gradient is computed."""

    precision: str = "8bit"
    """``8bit``, or ``bf16``: the plain product of 16-bit operands, for which the 16-bit input is kept."""

    def check(self, name: str) -> None:
        Product.check(self, name)
        if self.precision not in ("8bit", "bf16"):
            raise UserError(f"weights.{name}.precision={self.precision!r} is not one of 8bit, bf16.")


def halo(level: int) -> tuple[Product, Product, WeightGradient]:
    """HALO's levels (arXiv:2501.02625, with its 8-bit activation storage), all with tensor scales:

    0   Y = q(X) q(W)^T          E_X = q(E) q(W)                    G = q(E)^T q(X)
    1   Y = q(X H) q(W H)^T      E_X = [q(E) q(W H)] H^T            G = [q(E)^T q(X H)] H^T
    2   Y = q(X H) q(W H)^T      E_X = H [q(H^T E) q(W H)] H^T      G = [q(E)^T q(X H)] H^T
    """
    forward, input_gradient, weight_gradient = (
        ("none", "none", "none"),
        ("in", "in", "in"),
        ("in", "tokens+in", "in"),
    )[level]
    return (
        Product(rotate=forward, scale="tensor"),
        Product(rotate=input_gradient, scale="tensor"),
        WeightGradient(rotate=weight_gradient, scale="tensor"),
    )


PRESETS = {"halo0": 0, "halo1": 1, "halo2": 2}


@dataclass(frozen=True, slots=True)
class Plan:
    """The three products for one layer's shape. A block of 1 is no rotation."""

    dtype: torch.dtype
    in_block: int
    scale: str
    error_out_block: int
    error_in_block: int
    error_token_block: int
    error_scale: str
    weight_token_block: int
    weight_in_block: int
    weight_scale: str
    weight_16bit: bool
    fast_accumulation: bool
    fast_gradients: bool

    @property
    def is_plain(self) -> bool:
        """e4m3, a scale for each row, nothing rotated, and all three products in 8 bits: each operand is cast once."""
        once = self.shares_weight and self.shares_error and not self.weight_16bit
        return once and self.dtype == FP8 and self.scale == "row" and self.in_block == 1

    @property
    def shares_weight(self) -> bool:
        """The forward product's weight codes, transposed, serve the input gradient."""
        same = self.error_in_block == self.in_block and self.error_out_block == 1 and self.error_scale == self.scale
        return same and (self.dtype == FP8 or self.scale == "tensor")

    @property
    def shares_input(self) -> bool:
        """The forward product's input codes, transposed, serve the weight gradient."""
        same = self.weight_in_block == self.in_block and self.weight_token_block == 1
        return same and self.weight_scale == self.scale and (self.dtype == FP8 or self.scale == "tensor")

    @property
    def shares_error(self) -> bool:
        """The input gradient's error codes, transposed, serve the weight gradient."""
        plain = self.error_out_block == 1 and self.error_token_block == 1
        return self.shares_input and plain and self.error_scale == self.weight_scale


def make_plan(
    dtype: torch.dtype,
    forward: Product,
    input_gradient: Product,
    weight_gradient: WeightGradient,
    in_features: int,
    out_features: int,
    *,
    largest_block: int = LARGEST_BLOCK,
    wide_block: int = LARGEST_BLOCK,
    fast_accumulation: bool = True,
    fast_gradients: bool = False,
) -> Plan:
    """The products of one layer, with blocks that divide its dimensions. ``wide_block`` is the largest over the inputs
    where they are more than the outputs."""
    in_block = rotation_block(in_features, wide_block if in_features > out_features else largest_block)
    out_block = rotation_block(out_features, min(largest_block, GRADIENT_BLOCK))
    token_block = min(largest_block, GRADIENT_BLOCK)
    error, weight = input_gradient.rotate.split("+"), weight_gradient.rotate
    return Plan(
        dtype=dtype,
        in_block=in_block if forward.rotate == "in" else 1,
        scale=forward.scale,
        error_out_block=out_block if "out" in error else 1,
        error_in_block=in_block if "in" in error else 1,
        error_token_block=token_block if "tokens" in error else 1,
        error_scale=input_gradient.scale,
        weight_token_block=token_block if weight == "tokens" else 1,
        weight_in_block=in_block if weight == "in" else 1,
        weight_scale=weight_gradient.scale,
        weight_16bit=weight_gradient.precision == "bf16",
        fast_accumulation=fast_accumulation,
        fast_gradients=fast_gradients,
    )
