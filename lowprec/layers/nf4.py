"""NF4: frozen weights in 4 bits in bitsandbytes' storage, the base of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

A block of ``block_size`` weights shares one scale, its largest magnitude; each weight becomes the nearest of 16 levels,
quantiles of a normal distribution. ``double_quant`` stores those scales in 8 bits, 256 of them to a second scale.

What the products read is another question: ``product`` decodes the weight to 16 bits or straight to 8-bit codes.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from lowprec_kernels.hadamard.reference import LARGEST_BLOCK
from torch import nn

from lowprec.errors import UserError
from lowprec.layers.eight_bit_schemes import EightBit, Fp8, Int8Hadamard
from lowprec.layers.measured import layer_noise_db, milliseconds_of, normal_sample, record, remembered_times
from lowprec.layers.products import FP8, Plan
from lowprec.option import option

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
PRODUCTS: dict[str, type[EightBit] | None] = {"bf16": None, "fp8": Fp8, "int8": Int8Hadamard}
"""Name -> the 8-bit scheme whose forward and input gradient run, None for 16 bits."""
AUTO = "auto"


@option("weights", "nf4")
@dataclass(kw_only=True, slots=True)
class NF4:
    """Frozen linear layers in 4 bits (at block size 64: 4.13 bits a weight with double quantisation, 4.5 without)."""

    option_name: ClassVar[str]

    block_size: int = 64
    """Weights that share a scale."""
    double_quant: bool = True
    """Quantise the scales too: 0.37 bits a weight less at block size 64."""
    product: str = AUTO
    """``bf16`` (the model's dtype), ``fp8``, ``int8`` (rotated), or ``auto``: the fastest for each shape on this GPU
    whose noise stays within ``min_sqnr_db``. Without a GPU auto is bf16."""
    tokens: int = 4096
    """Tokens of a micro-batch, for which ``auto`` times them."""
    min_sqnr_db: float = 30.0
    """The least signal to noise, in dB, of output and input gradient against the decoded weight's fp32 products. At 30
    ``auto`` takes rotated int8 and not e4m3 (25 to 33 dB on real text: docs/lora.md); 20 lets both compete."""

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            choices = ", ".join(map(str, BLOCK_SIZES))
            raise UserError(f"weights.block_size={self.block_size} is not one of {choices}.")
        if self.product not in (AUTO, *PRODUCTS):
            raise UserError(f"weights.product={self.product!r} is not one of {', '.join((AUTO, *PRODUCTS))}.")
        if self.tokens < 1:
            raise UserError(f"weights.tokens={self.tokens} must be at least 1.")

    def why_not(self, linear: nn.Linear, frozen: bool) -> str | None:
        state = getattr(linear.weight, "quant_state", None)
        if state is not None:
            if hasattr(linear, "base_product"):
                return "already 4-bit"
            if state.quant_type != "nf4":
                return f"already 4-bit in the model's files, as {state.quant_type}"
            return None  # bitsandbytes' layer: its packed weight is taken over
        if not frozen:
            return "trained: a 4-bit weight cannot take gradient steps"
        if linear.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its weight is {linear.weight.dtype}, which bitsandbytes does not quantise"
        return self._why_no_product(linear, self.product)

    def _why_no_product(self, linear: nn.Linear, product: str) -> str | None:
        """Why the layer's products cannot run in 8 bits."""
        scheme = PRODUCTS.get(product)
        if scheme is None:
            return None
        out_features, in_features = linear.out_features, linear.in_features
        if in_features % 16 or out_features % 16:
            return f"8-bit products need multiples of 16, it is {out_features} x {in_features}"
        if linear.weight.device.type == "cuda":
            capability, needed = torch.cuda.get_device_capability(linear.weight.device), (8, 0)
            if scheme.dtype == FP8:
                needed = (8, 9)
            if capability < needed:
                return f"{product} products need compute capability {needed[0]}.{needed[1]}; this GPU has {capability}"
        return None

    def convert(self, linear: nn.Linear, frozen: bool) -> nn.Linear:
        reason = self.why_not(linear, frozen)
        assert reason is None, reason
        from lowprec.layers.nf4_linear import NF4Linear  # bitsandbytes takes seconds to import

        plan = self.product_plan(linear.in_features, linear.out_features)
        return NF4Linear(linear, self.block_size, self.double_quant, plan)

    def product_plan(self, in_features: int, out_features: int) -> Plan | None:
        """How the products of such a layer run in 8 bits; None in 16 bits, as for ``auto`` that has not chosen."""
        scheme = PRODUCTS.get(self.product)
        return None if scheme is None else scheme(wide_block=LARGEST_BLOCK).plan(in_features, out_features)

    def kernel(self, linear: nn.Linear) -> str:
        plan, device = linear.plan, linear.weight.device.type  # type: ignore[union-attr]
        if plan is None:
            return f"decoded to {str(linear.compute_dtype).removeprefix('torch.')} ({device})"
        name = "fp8" if plan.dtype == FP8 else "int8, rotated"
        return f"decoded to {name} ({device})"

    @property
    def chooses(self) -> bool:
        """Whether ``wrap`` asks ``choose``."""
        return self.product == AUTO

    def choose(
        self,
        model: nn.Module,
        linears: dict[str, tuple[nn.Linear, bool]],
        calibration: Any,
        device: torch.device | str | None = None,
        in_graphs: bool = False,
    ) -> dict[str, tuple["NF4", str]]:
        """Layer name -> the scheme with its product settled, and what was measured."""
        samples = record(model, linears, calibration) if calibration is not None else {}
        known: dict[tuple, tuple[NF4, str]] = {}
        verdicts = {}
        for name, (linear, _) in linears.items():
            target = torch.device(device) if device is not None else linear.weight.device
            if target.type != "cuda":
                verdicts[name] = (self._with("bf16"), "")
                continue
            shape = (linear.out_features, linear.in_features, linear.weight.dtype)
            if name in samples or shape not in known:  # without a sample, what holds for one holds for its shape
                known[shape] = self._verdict(copy.deepcopy(linear).to(target), samples.get(name), in_graphs)
            verdicts[name] = known[shape]
        return verdicts

    def _with(self, product: str) -> "NF4":
        return replace(self, product=product)

    def _verdict(
        self, linear: nn.Linear, sample: tuple[torch.Tensor, torch.Tensor] | None, in_graphs: bool = False
    ) -> tuple["NF4", str]:
        """The fastest product within the bound on noise for a layer that is on its device."""
        if self._with("bf16").why_not(linear, True) is not None:
            return self._with("bf16"), ""  # the report will say why it cannot be packed
        layers = {
            product: self._with(product).convert(linear, True)
            for product in PRODUCTS
            if self._why_no_product(linear, product) is None
        }
        shape = f"{linear.out_features}|{linear.in_features}|{layers['bf16'].compute_dtype}"
        key = f"nf4|{shape}|{self.block_size}|{self.double_quant}|{self.tokens}|{','.join(layers)}|{in_graphs}"
        times = remembered_times(
            linear.weight.device, key,
            lambda: {name: milliseconds_of(layer, self.tokens, True, in_graphs) for name, layer in layers.items()},
        )  # fmt: skip
        weight = layers["bf16"].dequantized_weight()  # type: ignore[operator]
        notes = []
        for product in sorted(layers, key=lambda name: times[name]):
            if product == "bf16":
                break
            worst = min(layer_noise_db(layers[product], weight, *(sample or normal_sample(layers["bf16"]))))
            if worst >= self.min_sqnr_db:
                measured = "" if sample else " on normal numbers (no calibration batch)"
                gain = times["bf16"] / times[product]
                return self._with(product), f"{gain:.2f}x 16 bits at {self.tokens} tokens, {worst:.0f} dB{measured}"
            notes.append(f"{product} {worst:.0f} dB is under {self.min_sqnr_db:.0f}")
        slower = [f"{name} {times['bf16'] / ms:.2f}x" for name, ms in times.items() if ms > times["bf16"]]
        return self._with("bf16"), f"16 bits are best at {self.tokens} tokens: {', '.join([*notes, *slower])}"
