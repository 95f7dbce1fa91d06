"""The three 8-bit schemes as choices of the recipe group ``weights``. Their products, as equations: products.py.

fp8             e4m3, row scales, nothing rotated: a float format carries its own scale
fp8_hadamard    the same with X and W rotated, for comparison and for HALO's levels 1 and 2
int8_hadamard   int8, row scales, the summed axis of each product rotated: the most accurate
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from lowprec_kernels.hadamard.reference import LARGEST_BLOCK
from torch import nn

from lowprec.errors import UserError
from lowprec.layers.eight_bit_linear import FrozenEightBitLinear, TrainedEightBitLinear
from lowprec.layers.products import FP8, PRESETS, WIDE_BLOCK, Plan, Product, WeightGradient, halo, make_plan
from lowprec.ops.backends import choose
from lowprec.ops.scaled_matmul import BACKENDS as PRODUCT_BACKENDS
from lowprec.option import option


@dataclass(kw_only=True, slots=True)
class EightBit:
    """Fields and behaviour of the 8-bit schemes."""

    option_name: ClassVar[str]
    dtype: ClassVar[torch.dtype]

    forward: Product = field(default_factory=Product)
    input_gradient: Product = field(default_factory=Product)
    weight_gradient: WeightGradient = field(default_factory=WeightGradient)
    preset: str = ""
    """``halo0``, ``halo1`` or ``halo2`` set all three products (products.py has the equations)."""
    cache: str = "none"
    """Codes of a trained weight that are kept between calls: ``none``, ``one`` (1 byte a weight), ``both`` (2)."""
    layout: str = "one"
    """Codes of a frozen weight: ``one`` (1 byte a weight; the input gradient's are made at each call) or ``both``
    (2)."""
    largest_block: int = LARGEST_BLOCK
    """Largest order of a rotation's blocks: a power of two from 16 to 256."""
    wide_block: int = LARGEST_BLOCK
    """The same over the inputs of layers that have more inputs than outputs, as down projections do."""
    fast_accumulation: bool = True
    """The forward product's sums may drop bits, as e4m3 tensor cores do by themselves."""
    fast_gradients: bool = False
    """The same for the two gradients."""

    def __post_init__(self) -> None:
        if self.preset:
            if self.preset not in PRESETS:
                raise UserError(f"weights.preset={self.preset!r} is not one of {', '.join(PRESETS)}.")
            self.forward, self.input_gradient, self.weight_gradient = halo(PRESETS[self.preset])
        for name in ("forward", "input_gradient", "weight_gradient"):
            getattr(self, name).check(name)
        for name, choices in (("cache", ("none", "one", "both")), ("layout", ("one", "both"))):
            if getattr(self, name) not in choices:
                raise UserError(f"weights.{name}={getattr(self, name)!r} is not one of {', '.join(choices)}.")
        for name in ("largest_block", "wide_block"):
            if getattr(self, name) not in (16, 32, 64, 128, 256):
                raise UserError(f"weights.{name}={getattr(self, name)} is not one of 16, 32, 64, 128, 256.")

    def plan(self, in_features: int, out_features: int) -> Plan:
        """The products for one shape."""
        return make_plan(
            self.dtype,
            self.forward,
            self.input_gradient,
            self.weight_gradient,
            in_features,
            out_features,
            largest_block=self.largest_block,
            wide_block=self.wide_block,
            fast_accumulation=self.fast_accumulation,
            fast_gradients=self.fast_gradients,
        )

    def why_not(self, linear: nn.Linear, frozen: bool) -> str | None:
        """See ``WeightScheme``."""
        out_features, in_features = linear.out_features, linear.in_features
        if type(linear) is not nn.Linear:
            return f"it is a {type(linear).__name__} already"
        if in_features % 16 or out_features % 16:
            return f"8-bit products need multiples of 16, it is {out_features} x {in_features}"
        weight = linear.weight
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its weight is {weight.dtype}"
        if weight.device.type == "meta":
            return "its weight is not loaded (meta device)"
        if weight.device.type == "cuda":
            capability = torch.cuda.get_device_capability(weight.device)
            needed = (8, 9) if self.dtype == FP8 else (8, 0)
            if capability < needed:
                return f"its products need compute capability {needed[0]}.{needed[1]}; this GPU has {capability}"
        return None

    def convert(self, linear: nn.Linear, frozen: bool) -> nn.Linear:
        """See ``WeightScheme``. A trained layer takes over the parameters; a frozen one keeps codes alone."""
        reason = self.why_not(linear, frozen)
        assert reason is None, reason
        plan = self.plan(linear.in_features, linear.out_features)
        if frozen:
            return FrozenEightBitLinear(linear, plan, self.layout)
        return TrainedEightBitLinear(linear, plan, self.cache)

    def kernel(self, linear: nn.Linear) -> str:
        """The backend of the forward product."""
        stored = getattr(linear, "stored", None)  # reading ``weight`` of a frozen layer decodes it
        device = (linear.weight if stored is None else stored).device
        a, scale = torch.empty(16, 16, dtype=self.dtype, device=device), torch.empty(16, device=device)
        backend = choose(PRODUCT_BACKENDS, a, scale, a, scale, None, torch.bfloat16, self.fast_accumulation)
        return f"{backend.name}, {str(self.dtype).removeprefix('torch.')}"


@option("weights", "fp8")
@dataclass(kw_only=True, slots=True)
class Fp8(EightBit):
    """e4m3 with row scales, unrotated."""

    dtype: ClassVar[torch.dtype] = FP8


@option("weights", "fp8_hadamard")
@dataclass(kw_only=True, slots=True)
class Fp8Hadamard(EightBit):
    """e4m3 with row scales, X and W rotated over the inputs."""

    dtype: ClassVar[torch.dtype] = FP8

    forward: Product = field(default_factory=lambda: Product(rotate="in"))
    input_gradient: Product = field(default_factory=lambda: Product(rotate="in"))
    weight_gradient: WeightGradient = field(default_factory=lambda: WeightGradient(rotate="in"))


@option("weights", "int8_hadamard")
@dataclass(kw_only=True, slots=True)
class Int8Hadamard(EightBit):
    """int8 with row scales, each product rotated over the axis that it sums."""

    dtype: ClassVar[torch.dtype] = torch.int8

    wide_block: int = WIDE_BLOCK
    forward: Product = field(default_factory=lambda: Product(rotate="in"))
    input_gradient: Product = field(default_factory=lambda: Product(rotate="out"))
    weight_gradient: WeightGradient = field(default_factory=lambda: WeightGradient(rotate="tokens"))
