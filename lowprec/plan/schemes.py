"""Schemes over tensors without data: bitsandbytes packs only what it can read, and ``auto`` times what it compares."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowprec.layers.auto import Auto
from lowprec.layers.bf16 import BF16
from lowprec.layers.decode_buffer import decode_buffer
from lowprec.layers.eight_bit_schemes import EightBit, Fp8, Int8Hadamard
from lowprec.layers.fused_experts import find_experts
from lowprec.layers.nf4 import NF4
from lowprec.machine import Machine
from lowprec.ops.scaled_grouped_matmul import CAPABILITY

PREDICTED = "predicted to be the fastest"
TYPICAL_DB = {"fp8": 28.0, "int8": 37.0}
"""Signal to noise of a layer's output or gradient, whichever is worse, as ``lowprec doctor`` finds it on an H100: e4m3,
and rotated int8."""
LAUNCHES = {(False, True): 4, (True, True): 6, (False, False): 3, (True, False): 12}
"""(8 bits, frozen) -> kernels of a layer's forward and gradients."""
NESTED_BLOCK = 256
"""Scales that share a second scale (bitsandbytes' ``QuantState``, blocksize of ``state2``)."""


@dataclass(kw_only=True, slots=True)
class NF4WithoutData(NF4):
    """``weights=nf4``, with the packed weight's shapes put where bitsandbytes would have packed it; ``product=auto`` by
    predicted times."""

    machine: Any = None

    def choose(
        self, model: nn.Module, linears: dict, calibration: Any, device: Any = None, in_graphs: bool = False
    ) -> dict:
        return {name: (self._fastest(linear, in_graphs), PREDICTED) for name, (linear, _) in linears.items()}

    def _fastest(self, linear: nn.Linear, in_graphs: bool) -> "NF4WithoutData":
        kinds = [*_choices(self.machine, self.min_sqnr_db, lambda kind: self._why_no_product(linear, kind) is None)]
        times = {kind: _layer_ms(self.machine, kind, linear, self.tokens, True, in_graphs) for kind in kinds}
        for kind in kinds:  # and decoded for either product: half a byte and its scales read, an operand written
            nbytes = (0.52 + (2 if kind == "bf16" else 1)) * linear.out_features * linear.in_features
            times[kind] += 2 * self.machine.traffic_ms(int(nbytes))
        return replace(self, product=min(kinds, key=lambda kind: times[kind]))

    def convert(self, linear: nn.Linear, frozen: bool) -> nn.Linear:
        if getattr(linear.weight, "quant_state", None) is None:
            linear.weight = self._packed(linear.weight)
        with unset_fake_temporarily():  # the class of the weight that the layer begins with takes no other beside it
            layer: Any = NF4.convert(replace(self, product="bf16"), linear, frozen)
        layer.plan = self.product_plan(layer.in_features, layer.out_features)
        if layer.plan is not None:
            layer.row_bits = torch.empty(layer.out_features, dtype=torch.int32)
            layer.column_bits = torch.empty(layer.in_features, dtype=torch.int32)
        return layer

    def _packed(self, weight: torch.Tensor) -> nn.Parameter:
        from bitsandbytes.functional import QuantState

        scales = -(-weight.numel() // self.block_size)
        common = {"shape": weight.shape, "dtype": weight.dtype, "quant_type": "nf4", "code": torch.empty(16)}
        if self.double_quant:
            second = QuantState(
                absmax=torch.empty(-(-scales // NESTED_BLOCK)),
                code=torch.empty(256),
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
            absmax, offset = torch.empty(scales, dtype=torch.uint8), torch.empty(())
            state = QuantState(absmax=absmax, blocksize=self.block_size, offset=offset, state2=second, **common)
        else:
            state = QuantState(absmax=torch.empty(scales), blocksize=self.block_size, **common)
        packed = nn.Parameter(torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        packed.quant_state, packed.quant_type = state, "nf4"  # type: ignore[attr-defined]
        packed.compress_statistics, packed.bnb_quantized = self.double_quant, True  # type: ignore[attr-defined]
        return packed


@dataclass(kw_only=True, slots=True)
class AutoWithoutData(Auto):
    """``weights=auto``, by predicted times."""

    machine: Any = None

    def choose(
        self, model: nn.Module, linears: dict, calibration: Any, device: Any = None, in_graphs: bool = False
    ) -> dict:
        return {
            name: (self._fastest(linear, frozen, in_graphs), PREDICTED) for name, (linear, frozen) in linears.items()
        }

    def _fastest(self, linear: nn.Linear, frozen: bool, in_graphs: bool) -> EightBit | None:
        schemes = {"fp8": Fp8, "int8": Int8Hadamard}
        candidates = {kind: scheme(cache=self.cache, layout=self.layout) for kind, scheme in schemes.items()}
        kinds = _choices(self.machine, self.min_sqnr_db, lambda kind: candidates[kind].why_not(linear, frozen) is None)
        best = min(kinds, key=lambda kind: _layer_ms(self.machine, kind, linear, self.tokens, frozen, in_graphs))
        return candidates.get(best)


def _choices(machine: Machine, min_sqnr_db: float, can: Callable[[str], bool]) -> Iterator[str]:
    """What schemes that measure compare: bf16, and the 8-bit products that the card has, within the bound on noise."""
    yield "bf16"
    for kind, needed in (("fp8", (8, 9)), ("int8", (8, 0))):
        has_units = kind in machine.tflops and (machine.capability or (0, 0)) >= needed
        if has_units and TYPICAL_DB[kind] >= min_sqnr_db and can(kind):
            yield kind


def _layer_ms(machine: Machine, kind: str, linear: nn.Linear, tokens: int, frozen: bool, in_graphs: bool) -> float:
    """Forward and gradients of a layer at ``tokens`` tokens; 8-bit operands are read in 16 bits and written in 8 first.
    One that is not replayed takes no less than the host's launches."""
    out, into, coded = linear.out_features, linear.in_features, kind != "bf16"
    shapes = [(tokens, out, into), (tokens, into, out), *([] if frozen else [(out, into, tokens)])]
    total = sum(machine.product_ms(kind, *shape) for shape in shapes)
    if coded:
        casts = [tokens * into, tokens * out] + ([] if frozen else [out * into, tokens * (into + out)])
        total += sum(machine.traffic_ms(3 * numel) for numel in casts)
    return total if in_graphs else max(total, LAUNCHES[coded, frozen] * machine.host_us / 1e3)


def without_data(weights: Any, machine: Machine) -> Any:
    """The scheme, or its stand-in where it needs the numbers themselves."""
    stand_in: Any = {NF4: NF4WithoutData, Auto: AutoWithoutData}.get(type(weights))
    if stand_in is None:
        return weights
    return stand_in(machine=machine, **{field.name: getattr(weights, field.name) for field in fields(weights)})


def experts_left_alone(model: nn.Module, machine: Machine) -> dict[str, BF16]:
    """Rules for fused experts that the machine's card does not multiply in 8 bits, which tensors without data, on the
    processor, do not tell."""
    if machine.capability in (None, CAPABILITY):
        return {}
    return {path: BF16() for path, _ in find_experts(model)}


def lend_once(model: nn.Module) -> torch.Tensor | None:
    """Let the buffer for decoded weights take its final size, as it has from the first step on.

    Returns:
        A tensor over all of the buffer; None where no layer is packed.
    """
    packed = [m for m in model.modules() if hasattr(m, "stored") and hasattr(getattr(m, "weight", None), "quant_state")]
    if not packed:
        return None
    largest = max(packed, key=lambda m: m.out_features * m.in_features)  # type: ignore[operator]
    dtype = largest.compute_dtype if largest.plan is None else largest.plan.dtype  # type: ignore[union-attr]
    shape = (largest.out_features, largest.in_features)
    with decode_buffer(torch.device("cpu")).lend(shape, dtype) as lent:  # type: ignore[arg-type]
        return lent
