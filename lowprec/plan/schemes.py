"""Schemes over tensors without data: bitsandbytes packs only what it can read, and ``auto`` times what it compares."""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowprec.layers.auto import Auto
from lowprec.layers.decode_buffer import decode_buffer
from lowprec.layers.eight_bit_schemes import EightBit, Fp8, Int8Hadamard
from lowprec.layers.nf4 import NF4, PRODUCTS
from lowprec.machine import Machine

NESTED_BLOCK = 256
"""Scales that share a second scale (bitsandbytes' ``QuantState``, blocksize of ``state2``)."""


@dataclass(kw_only=True, slots=True)
class NF4WithoutData(NF4):
    """``weights=nf4``, with the packed weight's shapes put where bitsandbytes would have packed it."""

    def convert(self, linear: nn.Linear, frozen: bool) -> nn.Linear:
        if getattr(linear.weight, "quant_state", None) is None:
            linear.weight = self._packed(linear.weight)
        with unset_fake_temporarily():  # the class of the weight that the layer begins with takes no other beside it
            layer: Any = NF4.convert(replace(self, product="bf16"), linear, frozen)
        scheme = PRODUCTS.get(self.product)
        if scheme is not None:
            layer.plan = scheme().plan(layer.in_features, layer.out_features)
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
    """``weights=auto``, by predicted times and without a bound on the noise."""

    machine: Any = None

    def choose(
        self, model: nn.Module, linears: dict, calibration: Any, device: Any = None, in_graphs: Any = None
    ) -> dict:
        return {name: (self._fastest(*entry), "predicted to be the fastest") for name, entry in linears.items()}

    def _fastest(self, linear: nn.Linear, frozen: bool) -> EightBit | None:
        capability, rates = self.machine.capability or (0, 0), self.machine.tflops
        found: list[tuple[float, EightBit | None]] = [(self._ms("bf16", linear, frozen), None)]
        for scheme, kind, needed in ((Fp8, "fp8", (8, 9)), (Int8Hadamard, "int8", (8, 0))):
            one = scheme(cache=self.cache, layout=self.layout)
            if kind in rates and capability >= needed and one.why_not(linear, frozen) is None:
                found.append((self._ms(kind, linear, frozen), one))
        return min(found, key=lambda entry: entry[0])[1]

    def _ms(self, kind: str, linear: nn.Linear, frozen: bool) -> float:
        """Forward and gradients at ``tokens`` tokens; 8-bit operands are read in 16 bits and written in 8 first."""
        tokens, out, into = self.tokens, linear.out_features, linear.in_features
        shapes = [(tokens, out, into), (tokens, into, out), *([] if frozen else [(out, into, tokens)])]
        total = sum(self.machine.product_ms(kind, *shape) for shape in shapes)
        if kind in ("fp8", "int8"):
            casts = [tokens * into, tokens * out] + ([] if frozen else [out * into, tokens * (into + out)])
            total += sum(self.machine.traffic_ms(3 * numel) for numel in casts)
        return total


def without_data(weights: Any, machine: Machine) -> Any:
    """The scheme, or its stand-in where it needs the numbers themselves."""
    stand_ins: dict[type, Any] = {NF4: NF4WithoutData, Auto: partial(AutoWithoutData, machine=machine)}
    if type(weights) not in stand_ins:
        return weights
    return stand_ins[type(weights)](**{field.name: getattr(weights, field.name) for field in fields(weights)})


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
