"""The layer of the scheme ``nf4``.

Forward: Y = X dq(W)^T + b. Input gradient: E_X = E_Y dq(W). There is no weight gradient, and nothing but the packed
weight is kept for backward: W is decoded for each product, into one buffer that all layers of a device share, either to
16 bits or straight to the 8-bit operand of the product (equations: products.py; int8 is rotated as in
``int8_hadamard``, e4m3 is not). The scales of those operands are found once, when the layer is made: one number for
each output and each input.
"""

from typing import Any

import bitsandbytes as bnb
import torch
from lowprec_kernels.nf4.reference import Packed
from lowprec_kernels.quantize_rows.reference import padded_rows
from lowprec_kernels.scaled_matmul.reference import add_low_rank
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowprec.layers.decode_buffer import decode_buffer
from lowprec.layers.eight_bit import Codes, SharedInput, error_codes, forward_product, input_gradient
from lowprec.layers.products import Plan
from lowprec.ops import decode_nf4, quantize_columns, quantize_rows

FEW_TOKENS = 16
"""Up to this many rows of X on a GPU, as in generation, bitsandbytes' product reads the packed weight itself."""


class NF4Linear(bnb.nn.Linear4bit):
    """bitsandbytes' layer, which PEFT recognises, with its weight packed from the beginning.

    Args:
        linear: a plain layer, which is packed where it is, or one of bitsandbytes', whose packed weight is taken over.
        plan: the 8-bit products, None for products in the dtype of the input.
    """

    returns_input_dtype = True

    def __init__(self, linear: nn.Linear, block_size: int, double_quant: bool, plan: Plan | None = None):
        weight = linear.weight
        packed = getattr(weight, "quant_state", None) is not None
        with torch.device("meta"):
            super().__init__(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=getattr(linear, "compute_dtype", None) or _float(weight),
                compress_statistics=weight.quant_state.nested if packed else double_quant,  # type: ignore[attr-defined]
                quant_type="nf4",
            )
        if not packed:
            fresh: nn.Parameter = bnb.nn.Params4bit(
                weight.detach(),
                requires_grad=False,
                blocksize=block_size,
                compress_statistics=double_quant,
                quant_type="nf4",
                module=self,
            )
            weight = fresh.to(weight.device)  # bitsandbytes packs when told to move, also to where it is
        assert weight.dtype == torch.uint8
        self.weight = weight
        self.bias = linear.bias
        self.plan = plan
        self._find_scales()
        self.train(linear.training)

    row_bits: torch.Tensor | None
    column_bits: torch.Tensor | None

    @torch.no_grad()
    def _find_scales(self) -> None:
        """The scales of both 8-bit operands, stored as the bits of fp32, so that ``.to(dtype)`` leaves them alone."""
        row = column = None
        if self.plan is not None:
            plan, weight = self.plan, self._decoded(torch.float32)
            row = quantize_rows(weight, plan.in_block, plan.dtype)[1].view(torch.int32)
            column = quantize_columns(weight, plan.error_out_block, plan.dtype)[1].view(torch.int32)
        self.register_buffer("row_bits", row, persistent=False)
        self.register_buffer("column_bits", column, persistent=False)

    @property
    def stored(self) -> Packed:
        """The weight as the decoder reads it."""
        state = self.weight.quant_state  # type: ignore[attr-defined]
        absmax, second = state.absmax, state.state2
        nested = (second.code, second.absmax, state.offset, second.blocksize) if state.nested else (None, None, None, 0)
        return Packed(self.weight.data.reshape(-1), state.code, absmax, state.blocksize, *nested)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, multiplied in the compute dtype (or in 8 bits, as the plan says) and given
        back in the dtype of ``x``.

        bitsandbytes' own forward is not used: on a CPU with AVX512-BF16 it repacks the weight at the first call in
        ``eval`` mode, and from then on no gradient passes the layer; it stores a trained fp32 bias back in the dtype of
        ``x``; and on a processor it decodes wrongly where a row is no whole number of blocks.
        """
        y = _Product.apply(x.to(self.compute_dtype).reshape(-1, self.in_features), self.bias, self)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def base_product(
        self,
        inputs: SharedInput,
        bias: torch.Tensor | None,
        low: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Y = X W^T + b + L B^T, ``[tokens, out]`` in the dtype of X, without autograd. L (``low [tokens, r]``) is in
        the dtype of X, B (``up [out, r]``) in any."""
        x, plan = inputs.x, self.plan
        if x.device.type == "cuda" and x.shape[0] <= FEW_TOKENS:
            y = bnb.matmul_4bit(x, self.weight, quant_state=self.weight.quant_state)  # type: ignore[attr-defined]
            return add_low_rank(y if bias is None else y.add_(bias), low, up)
        dtype = x.dtype if plan is None else plan.dtype
        with decode_buffer(x.device).lend((self.out_features, self.in_features), dtype) as w:
            if plan is None:
                decode_nf4(*self.stored, self.out_features, w)
                return add_low_rank(F.linear(x, w, None if bias is None else bias.to(x.dtype)), low, up)
            assert self.row_bits is not None
            scale = self.row_bits.view(torch.float32)
            decode_nf4(*self.stored, self.out_features, w, scale, plan.in_block)
            return forward_product(inputs.codes(plan), Codes(w, scale), bias, plan, inputs.x.dtype, low, up)

    def base_gradient(self, error: torch.Tensor) -> torch.Tensor:
        """E W, ``[tokens, in]``, for ``error [tokens, out]``, without autograd."""
        plan, rows = self.plan, self.out_features
        if plan is None:
            with decode_buffer(error.device).lend((rows, self.in_features), error.dtype) as w:
                decode_nf4(*self.stored, rows, w)
                return error @ w
        assert self.column_bits is not None
        scale, block = self.column_bits.view(torch.float32), plan.error_out_block
        with decode_buffer(error.device).lend((self.in_features, padded_rows(rows, block)), plan.dtype) as w:
            decode_nf4(*self.stored, rows, w, scale, 1, block, True)
            codes = error_codes(error, plan, None)
            return input_gradient(codes, Codes(w, scale), plan, error.shape[0], error.dtype)

    @torch.no_grad()
    def dequantized_weight(self) -> torch.Tensor:
        """The weight ``[out, in]`` that the products use, in the compute dtype."""
        return self._decoded(self.compute_dtype)

    def _decoded(self, dtype: torch.dtype) -> torch.Tensor:
        w = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        decode_nf4(*self.stored, self.out_features, w)
        return w

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
        """As bitsandbytes writes it: ``weight``, and the quantisation state under ``weight.``."""
        name = prefix + "weight"
        parts = {key.removeprefix(name + "."): value for key, value in state.items() if key.startswith(name + ".")}
        if name not in state or not parts:
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
            return
        loaded = bnb.nn.Params4bit.from_prequantized(state[name], parts, device=self.weight.device, module=self)
        shape = tuple(loaded.quant_state.shape)
        if shape != (self.out_features, self.in_features):
            errors.append(
                f"size mismatch for {name}: {shape} in the file, {(self.out_features, self.in_features)} here."
            )
            return
        self.weight = loaded
        self._find_scales()
        if self.bias is not None:
            if prefix + "bias" in state:
                with torch.no_grad():
                    self.bias.copy_(state[prefix + "bias"])
            else:
                missing.append(prefix + "bias")


def _float(weight: torch.Tensor) -> torch.dtype:
    """The dtype that products of this weight are computed in."""
    state = getattr(weight, "quant_state", None)
    return weight.dtype if state is None else state.dtype


class _Product(torch.autograd.Function):
    """Y = X W^T + b and the input gradient. The layer itself is what backward needs."""

    @staticmethod
    def forward(ctx: Any, x, bias, layer):
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        return layer.base_product(SharedInput(x), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error):
        error, grad_x, grad_bias = error.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.layer.base_gradient(error)
        if ctx.needs_input_grad[1]:
            grad_bias = error.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, None
