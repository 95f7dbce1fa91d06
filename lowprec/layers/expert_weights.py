"""Weights of fused experts, frozen and stored as e4m3 codes with row scales: the products of all experts in one call.

Shapes: X [rows, in], the rows of an expert one after the other, W [experts, out, in], Y and E = dL/dY [rows, out].

    forward           q(X) q(W[e])^T
    input gradient    q(E) q(W[e])

The input gradient sums over ``out``, along which the row scales of W lie. They are powers of two, and each over its
expert's largest folds into the codes while these are transposed, as in the two-dimensional layers.
"""

import torch
from lowprec_kernels.quantize_rows.reference import dequantize
from torch import nn
from torch.autograd.function import once_differentiable

from lowprec.layers.decoded_weight import warn_that_decoded_is_saved
from lowprec.layers.eight_bit import in_autocast_dtype
from lowprec.ops import quantize_rows, scaled_grouped_matmul, transpose_codes
from lowprec.ops.backends import FP8


class GroupedProduct(torch.autograd.Function):
    """Y and the input gradient in 8 bits. Nothing is kept of X.

    Args:
        x: ``[rows, in]``.
        offsets: ``[experts]``, int32: where the rows of each expert end. The last is ``rows``.
        codes: of W, ``[experts, out, in]``, with ``scale [experts, out]``.
        transposed: the codes as ``transposed_codes`` gives them, or None to make them in backward.
        backward_scale: ``[experts, in]``, of the transposed codes.
        factor: ``[experts * out]``, what folds into them.
    """

    @staticmethod
    def forward(ctx, x, offsets, codes, scale, transposed, backward_scale, factor, fast_forward, fast_gradients):
        y = scaled_grouped_matmul(*quantize_rows(x, 1, FP8), codes, scale, offsets, x.dtype, fast_forward)
        ctx.save_for_backward(offsets, codes if transposed is None else transposed, backward_scale, factor)
        ctx.is_transposed, ctx.fast_gradients, ctx.x_dtype = transposed is not None, fast_gradients, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, error):
        offsets, codes, scale, factor = ctx.saved_tensors
        transposed = codes if ctx.is_transposed else transposed_codes(codes, factor)
        rows = quantize_rows(error.contiguous(), 1, FP8)
        grad_x = scaled_grouped_matmul(*rows, transposed, scale, offsets, ctx.x_dtype, ctx.fast_gradients)
        return grad_x, None, None, None, None, None, None, None, None


def transposed_codes(codes: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``codes [experts, out, in]``, rows times ``factor [experts * out]``, as ``[experts, in, out]``: a view of one
    transposition of all experts, ``[in, experts * out]``."""
    experts, out, into = codes.shape
    return transpose_codes(codes.view(-1, into), factor).view(into, experts, out).transpose(0, 1)


class FrozenExpertWeights(nn.Module):
    """The weights ``[experts, out, in]`` of one projection, stored as codes alone.

    The parameter ``weight`` holds the codes as int8, so that ``.to(dtype)`` leaves them alone; so do buffers hold the
    scales' bits. A state dict has the decoded weights, on the CPU, under the name of the parameter that they took the
    place of: the module's own without ``SUFFIX``. Loading quantises them again.

    Args:
        weight: ``[experts, out, in]``, out and in multiples of 16.
        layout: ``one`` transposes the codes in each backward; ``both`` keeps them transposed, too.
        fast_forward: whether sums of the forward product may drop bits, as e4m3 tensor cores do by themselves;
            ``fast_gradients`` the same for the input gradient.
        origin: the model's name, for who saves a state dict.
    """

    SUFFIX = "_codes"

    scale_bits: torch.Tensor
    backward_bits: torch.Tensor
    factor_bits: torch.Tensor
    transposed: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, layout: str, fast_forward: bool, fast_gradients: bool, origin: str = ""):
        super().__init__()
        self.shape, self.compute_dtype = tuple(weight.shape), weight.dtype
        self.layout, self.fast_forward, self.fast_gradients, self.origin = layout, fast_forward, fast_gradients, origin
        self._store(weight.detach())

    @torch.no_grad()
    def _store(self, weight: torch.Tensor) -> None:
        experts, out, into = self.shape
        codes, scale = quantize_rows(weight.reshape(-1, into), 1, FP8, power_of_two=True)
        scale = scale.view(experts, out)
        largest = scale.amax(1, keepdim=True)
        factor = (scale / largest).view(-1)
        self.weight = nn.Parameter(codes.view(torch.int8).view(self.shape), requires_grad=False)
        self.register_buffer("scale_bits", scale.view(torch.int32), persistent=False)
        self.register_buffer("backward_bits", largest.repeat(1, into).view(torch.int32), persistent=False)
        self.register_buffer("factor_bits", factor.view(torch.int32), persistent=False)
        both = transpose_codes(codes, factor).view(torch.int8) if self.layout == "both" else None
        self.register_buffer("transposed", both, persistent=False)

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight.detach().view(FP8), self.scale_bits.view(torch.float32)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """``x [rows, in]``, sorted by expert, to ``[rows, out]`` in its dtype, or in autocast's where that is on.
        ``offsets [experts]``, int32: where the rows of each expert end."""
        experts, out, into = self.shape
        transposed = self.transposed
        if transposed is not None:
            transposed = transposed.view(FP8).view(into, experts, out).transpose(0, 1)
        backward = (transposed, self.backward_bits.view(torch.float32), self.factor_bits.view(torch.float32))
        fast = self.fast_forward, self.fast_gradients
        return GroupedProduct.apply(in_autocast_dtype(x), offsets, *self._codes(), *backward, *fast)

    @torch.no_grad()
    def dequantized_weight(self) -> torch.Tensor:
        """The weights ``[experts, out, in]`` that the products use, in the dtype that they had."""
        codes, scale = self._codes()
        flat = dequantize(codes.view(-1, self.shape[2]), scale.view(-1))
        return flat.to(self.compute_dtype).view(self.shape)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        warn_that_decoded_is_saved(self.origin)
        destination[prefix.removesuffix(f"{self.SUFFIX}.")] = self.dequantized_weight().cpu()

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
        name, value = prefix.removesuffix(f"{self.SUFFIX}."), state.get(f"{prefix}weight")
        if value is None:
            missing.append(name)
        elif tuple(value.shape) != self.shape:
            errors.append(f"size mismatch for {name}: {tuple(value.shape)} in the file, {self.shape} here.")
        else:
            self._store(value.to(self.weight.device, self.compute_dtype))

    def extra_repr(self) -> str:
        return "experts={}, out_features={}, in_features={}, codes=fp8".format(*self.shape)
