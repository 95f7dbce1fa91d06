"""4-bit layers over tensors without data: bitsandbytes packs only what it can read."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowprec.layers.decode_buffer import DecodeBuffer, decode_buffer
from lowprec.layers.nf4 import NF4, PRODUCTS

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


def without_data(weights: object) -> object:
    """The scheme, or its stand-in where it needs the numbers themselves."""
    if type(weights) is not NF4:
        return weights
    return NF4WithoutData(**{field.name: getattr(weights, field.name) for field in fields(NF4)})


def lend_once(model: nn.Module) -> DecodeBuffer | None:
    """Let the buffer for decoded weights take its final size, as it has from the first step on."""
    packed = [m for m in model.modules() if hasattr(m, "stored") and hasattr(getattr(m, "weight", None), "quant_state")]
    if not packed:
        return None
    largest = max(packed, key=lambda m: m.out_features * m.in_features)  # type: ignore[operator]
    buffer = decode_buffer(torch.device("cpu"))
    dtype = largest.compute_dtype if largest.plan is None else largest.plan.dtype  # type: ignore[union-attr]
    with buffer.lend((largest.out_features, largest.in_features), dtype):  # type: ignore[arg-type]
        return buffer
