"""Linear layers with 8-bit products: one for weights that train, one for weights that are frozen and stored as
codes."""

import warnings

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lowprec.layers.decoded_weight import DecodedWeight, warn_that_decoded_is_saved
from lowprec.layers.eight_bit import (
    Codes,
    SharedInput,
    TrainedOperands,
    decoded_weight,
    error_codes,
    fold_factor,
    forward_product,
    frozen_transposed_weight,
    in_autocast_dtype,
    input_gradient,
    transposed_weight,
    weight_codes,
)
from lowprec.layers.eight_bit_functions import FrozenProduct, trained_product
from lowprec.layers.products import FP8, Plan
from lowprec.layers.weight_cache import WeightCache
from lowprec.sharded import is_sharded


class _EightBitLinear(nn.Linear):
    """What both have in common: autocast, any leading shape, the printed form."""

    plan: Plan

    @property
    def rotation_block(self) -> int | None:
        """Order of the forward rotation's blocks, None without one."""
        return self.plan.in_block if self.plan.in_block > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` to ``[..., out]`` in the dtype of ``x``, or in autocast's where that is on."""
        x = in_autocast_dtype(x)
        y = self._product(x.reshape(-1, self.in_features))
        return y.reshape(*x.shape[:-1], self.out_features)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        codes = "fp8" if self.plan.dtype == FP8 else "int8"
        rotation = f", rotation={self.rotation_block}" if self.rotation_block else ""
        return f"{super().extra_repr()}, codes={codes}{rotation}"


class TrainedEightBitLinear(_EightBitLinear):
    """A linear layer whose weight stays an ordinary parameter; all three products run in 8 bits.

    An evaluation (``eval()`` without gradients) takes the parameter as it is: that is what gets saved and used, and
    what its loss should be of. e4m3 products alone add 0.95 % to the held-out loss of SmolLM2-135M.

    ``cache`` says what outlives a call: ``none``; ``one``, the codes of the forward product; ``both``, those of the
    input gradient too. ``weight_cache.py`` says when they are made again. Writing through ``weight.data`` between two
    steps of the optimizer moves nothing that can be seen: call ``forget_codes()`` after that.
    """

    def __init__(self, linear: nn.Linear, plan: Plan, cache: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.plan, self.cache = plan, cache
        self.forget_codes()

    def forget_codes(self) -> None:
        """Drop the cached codes of the weight."""
        self._kept: WeightCache[TrainedOperands] = WeightCache(self.weight)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.forget_codes()

    def operands(self) -> TrainedOperands:
        """The weight's operands as they are now, from the cache where it has them."""
        if not self.weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(
                "an 8-bit layer that was built for training has a frozen weight now, which keeps its 16-bit copy: call "
                "wrap(model, ..., frozen=True) before the adapters are attached to store it in 8 bits alone.",
                stacklevel=2,
            )
        if self.cache == "none":
            return TrainedOperands(weight_codes(self.weight.detach(), self.plan), None)
        return self._kept.get(self.weight, self._make_operands)

    def _make_operands(self) -> TrainedOperands:
        weight = self.weight.detach()
        forward = weight_codes(weight, self.plan)
        backward = transposed_weight(weight, forward, self.plan) if self.cache == "both" else None
        return TrainedOperands(forward, backward)

    @property
    def is_evaluated(self) -> bool:
        """Whether a call now takes the 16-bit parameter."""
        return not self.training and not torch.is_grad_enabled()

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_evaluated:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.weight.to(x.dtype), bias)
        return trained_product(x, self.weight, self.bias, self.operands(), self.plan)

    def dequantized_weight(self) -> torch.Tensor:
        """The weight ``[out, in]``: the parameter itself."""
        return self.weight


class FrozenEightBitLinear(_EightBitLinear):
    """A linear layer whose weight is stored as 8-bit codes alone; the products of forward and input gradient run in 8
    bits.

    The parameter registered as ``weight`` holds the codes as int8 (also those of e4m3, so that ``.to(dtype)`` leaves
    them alone), and so do buffers hold the scales' bits; reading ``layer.weight`` gives the decoded weight. A state
    dict has ``weight`` (decoded, on the CPU) and ``bias``; loading one quantises it again.

    Args:
        layout: ``one`` keeps the forward product's codes (1 byte a weight) and makes the input gradient's at each call;
            ``both`` keeps the two (2 bytes).
    """

    def __init__(self, linear: nn.Linear, plan: Plan, layout: str, origin: str = ""):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.plan, self.layout, self.origin = plan, layout, origin
        self.compute_dtype = linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        self._store(linear.weight.detach())

    scale_bits: torch.Tensor
    backward_codes: torch.Tensor | None
    backward_bits: torch.Tensor
    factor_bits: torch.Tensor | None

    @torch.no_grad()
    def _store(self, weight: torch.Tensor) -> None:
        forward = weight_codes(weight, self.plan)
        self._parameters["weight"] = nn.Parameter(forward.codes.view(torch.int8), requires_grad=False)
        self.register_buffer("scale_bits", forward.scale.view(torch.int32), persistent=False)
        backward = transposed_weight(weight, forward, self.plan)
        codes = backward.codes.view(torch.int8) if self.layout == "both" else None
        self.register_buffer("backward_codes", codes, persistent=False)
        # One a column, also where they are the same: cuBLAS takes them as they are, without a copy at each call.
        scale = backward.scale.expand(self.in_features).contiguous()
        self.register_buffer("backward_bits", scale.view(torch.int32), persistent=False)
        factor = fold_factor(forward, self.plan) if self.layout == "one" else None
        self.register_buffer("factor_bits", None if factor is None else factor.view(torch.int32), persistent=False)

    @property
    def stored(self) -> nn.Parameter:
        """The codes of the forward product as int8, ``[out, in]``."""
        stored = self._parameters["weight"]
        assert stored is not None
        return stored

    def _codes(self) -> Codes:
        return Codes(self.stored.detach().view(self.plan.dtype), self.scale_bits.view(torch.float32))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The decoded weight, anew for each reading; where FSDP2 has sharded the codes, its shard of them."""
        stored = self._parameters["weight"]
        if is_sharded(stored):
            return stored  # type: ignore[return-value]
        if isinstance(stored, FakeTensor):  # of a plan: one has no numbers, and a class already
            return self.dequantized_weight()
        shape = (self.out_features, self.in_features)
        return DecodedWeight(self.dequantized_weight, shape, self.compute_dtype, self.stored.device)

    @torch.no_grad()
    def dequantized_weight(self) -> torch.Tensor:
        """The weight ``[out, in]`` that the products use, un-rotated, in the dtype that it had."""
        return decoded_weight(self._codes(), self.plan, self.compute_dtype)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        backward = None if self.backward_codes is None else self.backward_codes.view(self.plan.dtype)
        return FrozenProduct.apply(x, self.bias, *self._codes(), backward, *self._backward_scales(), self.plan)

    def _backward_scales(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the input gradient's weight operand: its scales ``[in]`` and ``fold_factor``."""
        factor = None if self.factor_bits is None else self.factor_bits.view(torch.float32)
        return self.backward_bits.view(torch.float32), factor

    def base_product(
        self,
        inputs: SharedInput,
        bias: torch.Tensor | None,
        low: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Y = X W^T + b + L B^T, ``[tokens, out]``, without autograd: for functions of more than this layer. L
        (``low [tokens, r]``) is in the dtype of X, B (``up [out, r]``) in any."""
        return forward_product(inputs.codes(self.plan), self._codes(), bias, self.plan, inputs.x.dtype, low, up)

    def base_gradient(self, error: torch.Tensor) -> torch.Tensor:
        """E W, ``[tokens, in]``, for ``error [tokens, out]``, without autograd."""
        scale, factor = self._backward_scales()
        if self.backward_codes is None:
            codes = frozen_transposed_weight(self._codes(), scale, factor, self.plan)
        else:
            codes = Codes(self.backward_codes.view(self.plan.dtype), scale)
        rows = error_codes(error, self.plan, None)
        return input_gradient(rows, codes, self.plan, error.shape[0], error.dtype)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        warn_that_decoded_is_saved(self.origin)
        destination[prefix + "weight"] = self.dequantized_weight().cpu()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
        device = self.stored.device
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        if self.bias is not None:
            shapes["bias"] = (self.out_features,)
        for name, shape in shapes.items():
            value = state.get(prefix + name)
            if value is None:
                missing.append(prefix + name)
            elif tuple(value.shape) != shape:
                errors.append(f"size mismatch for {prefix}{name}: {tuple(value.shape)} in the file, {shape} here.")
            elif name == "weight":
                self._store(value.to(device, self.compute_dtype))
            else:
                with torch.no_grad():
                    self.bias.copy_(value)
        known = {prefix + name for name in shapes}
        unexpected += [key for key in state if key.startswith(prefix) and key not in known] if strict else []
