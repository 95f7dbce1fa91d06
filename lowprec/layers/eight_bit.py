"""The three 8-bit products as functions of tensors. Equations: products.py; autograd functions made of them:
eight_bit_functions.py, gated_mlp.py.

Shapes: X [tokens, in], W [out, in], Y and E = dL/dY [tokens, out], G [out, in]. Scales stay on the device throughout.
"""

from typing import NamedTuple

import torch
from lowprec_kernels.quantize_rows.reference import cast, dequantize, padded_rows, scale_of

from lowprec.layers.products import Plan
from lowprec.ops import (
    fold_scales,
    quantize_columns,
    quantize_rows,
    requantize_columns,
    rotate,
    scaled_matmul,
    transpose_codes,
)


class Codes(NamedTuple):
    """8-bit codes ``[rows, dim]`` with the scales ``[rows]``, or one scale, that take them back to values."""

    codes: torch.Tensor
    scale: torch.Tensor


class TrainedOperands(NamedTuple):
    """What is made of a trained weight: the operand of the forward product, and that of the input gradient where it is
    kept between calls."""

    forward: Codes
    backward: Codes | None


def weight_codes(weight: torch.Tensor, plan: Plan) -> Codes:
    """The forward product's weight operand ``[out, in]``. Scales that will be folded are powers of two."""
    folded = plan.shares_weight and plan.scale == "row"
    return _rows(weight, plan.in_block, plan.scale, plan.dtype, folded)


def transposed_weight(weight: torch.Tensor | None, codes: Codes, plan: Plan) -> Codes:
    """The input gradient's weight operand ``[in, out]``, from the forward codes where they serve, else from W."""
    if not plan.shares_weight:
        assert weight is not None
        return _error_weight(weight, plan)
    if plan.scale == "tensor":
        return Codes(transpose_codes(codes.codes), codes.scale)
    factor, largest = fold_scales(codes.scale, None, codes.codes.shape[1])
    return Codes(transpose_codes(codes.codes, factor), largest)


def _error_weight(weight: torch.Tensor, plan: Plan) -> Codes:
    return _columns(weight, plan.error_in_block, plan.error_out_block, plan.error_scale, plan.dtype)


def fold_factor(weight: Codes, plan: Plan) -> torch.Tensor | None:
    """``[out]``, by what the forward codes' rows are multiplied to become the input gradient's operand; None where its
    codes are others, or the same."""
    return fold_scales(weight.scale)[0] if plan.shares_weight and plan.scale == "row" else None


def frozen_transposed_weight(
    codes: Codes, column_scale: torch.Tensor, factor: torch.Tensor | None, plan: Plan
) -> Codes:
    """The input gradient's weight operand from the stored forward codes alone, made at each call (2 bytes of traffic a
    weight) with the scales (and ``fold_factor``) that were found once. Rotated otherwise, it is cast again."""
    if plan.shares_weight:
        return Codes(transpose_codes(codes.codes, factor), column_scale)
    if plan.scale == "tensor" or plan.error_scale == "tensor" or plan.error_in_block > 1:
        return transposed_weight(decoded_weight(codes, plan, torch.bfloat16), codes, plan)
    return Codes(requantize_columns(*codes, plan.in_block, plan.error_out_block, column_scale), column_scale)


def decoded_weight(codes: Codes, plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[out, in]`` that the codes stand for, un-rotated, in ``dtype``."""
    return _rotated(dequantize(codes.codes, codes.scale), plan.in_block).to(dtype)


def in_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """``x``, cast where autocast is on, as PyTorch's own products cast their inputs."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class SharedInput:
    """The input ``[tokens, in]`` of several products, quantised once for each way in which they want it."""

    def __init__(self, x: torch.Tensor):
        self.x = x
        self._codes: dict[tuple, Codes] = {}

    def codes(self, plan: Plan) -> Codes:
        """As the forward product of ``plan`` reads it."""
        key = (plan.dtype, plan.in_block, plan.scale)
        if key not in self._codes:
            self._codes[key] = input_codes(self.x, plan)
        return self._codes[key]


def input_codes(x: torch.Tensor, plan: Plan) -> Codes:
    """The forward product's input operand ``[tokens, in]``."""
    return _rows(x, plan.in_block, plan.scale, plan.dtype)


def forward_product(
    x_codes: Codes,
    weight: Codes,
    bias: torch.Tensor | None,
    plan: Plan,
    out_dtype: torch.dtype,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Y, plus ``low [tokens, r] up [out, r]^T``."""
    return scaled_matmul(*x_codes, *weight, bias, out_dtype, plan.fast_accumulation, low, up)


def input_for_backward(x: torch.Tensor, x_codes: Codes, plan: Plan) -> tuple[torch.Tensor, ...]:
    """What the weight gradient keeps of X: 8-bit codes, or X itself where it is computed in 16 bits."""
    if plan.weight_16bit:
        return (x,)
    if plan.shares_input:
        return x_codes
    return _columns(x, plan.weight_in_block, plan.weight_token_block, plan.weight_scale, plan.dtype)


def weight_for_backward(
    weight: torch.Tensor, operands: TrainedOperands, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the input gradient keeps of a trained W: its operand where that outlives the call, else what it is made
    of."""
    if operands.backward is not None:
        return operands.backward
    return operands.forward if plan.shares_weight else (weight, None)


def operand_from_kept(kept: tuple[torch.Tensor, torch.Tensor | None], cached: bool, plan: Plan) -> Codes:
    """The input gradient's weight operand ``[in, out]``, from what ``weight_for_backward`` gave; ``cached``: it is
    that."""
    first, second = kept
    if not cached and not plan.shares_weight:
        return _error_weight(first, plan)
    assert second is not None
    codes = Codes(first, second)
    return codes if cached else transposed_weight(None, codes, plan)


def error_codes(error: torch.Tensor, plan: Plan, kept: tuple[torch.Tensor, ...] | None) -> Codes:
    """The input gradient's error operand ``[tokens, out]``; where the weight gradient will reuse it, its scales pair up
    with the input's (``kept``) to powers of two."""
    if plan.error_token_block > 1:
        error = _rotated(_filled_up(error, plan.error_token_block), plan.error_token_block, axis=0)
    folds = plan.shares_error and not plan.weight_16bit and plan.error_scale == "row"
    partner = kept[1] if folds and kept is not None else None
    return _rows(error, plan.error_out_block, plan.error_scale, plan.dtype, partner is not None, partner)


def input_gradient(error: Codes, weight: Codes, plan: Plan, tokens: int, out_dtype: torch.dtype) -> torch.Tensor:
    """E_X ``[tokens, in]``."""
    grad = scaled_matmul(*error, *weight, None, out_dtype, plan.fast_gradients)
    grad = _rotated(grad, plan.error_in_block)
    return _rotated(grad, plan.error_token_block, axis=0)[:tokens]


def weight_gradient(
    error: torch.Tensor, error_rows: Codes | None, kept: tuple[torch.Tensor, ...], plan: Plan, out_dtype: torch.dtype
) -> torch.Tensor:
    """G ``[out, in]`` from E ``[tokens, out]`` (and its codes, where the input gradient made them) and what was kept
    of X."""
    if plan.weight_16bit:
        return (error.t() @ kept[0].to(error.dtype)).to(out_dtype)
    if not plan.shares_input:
        errors = _columns(error, 1, plan.weight_token_block, plan.weight_scale, plan.dtype)
        grad = scaled_matmul(*errors, *kept, None, out_dtype, plan.fast_gradients)
        return _rotated(grad, plan.weight_in_block)
    x_codes, x_scale = kept
    if error_rows is None or not plan.shares_error:
        row = plan.weight_scale == "row"
        error_rows = _rows(error, 1, plan.weight_scale, plan.dtype, row, x_scale if row else None)
    return shared_weight_gradient(error_rows, x_scale, transpose_codes(x_codes), plan, out_dtype)


def shared_weight_gradient(
    error: Codes, x_scale: torch.Tensor, x_columns: torch.Tensor, plan: Plan, out_dtype: torch.dtype
) -> torch.Tensor:
    """G ``[out, in]`` from the row codes of E, and those of X transposed ``[in, tokens']`` with their scales."""
    if plan.weight_scale == "tensor":
        errors = Codes(transpose_codes(error.codes), error.scale * x_scale)
    else:  # the scales lie along the sum: fold them, as powers of two, into the codes of E
        factor, largest = fold_scales(error.scale, x_scale)
        errors = Codes(transpose_codes(error.codes, factor), largest)
    one = torch.ones_like(errors.scale)
    grad = scaled_matmul(*errors, x_columns, one, None, out_dtype, plan.fast_gradients)
    return _rotated(grad, plan.weight_in_block)


def _rows(
    z: torch.Tensor,
    block: int,
    scale: str,
    dtype: torch.dtype,
    power_of_two: bool = False,
    partner: torch.Tensor | None = None,
) -> Codes:
    if scale == "row":
        return Codes(*quantize_rows(z, block, dtype, power_of_two, partner))
    return _one_scale(_rotated(z, block), dtype)


def _columns(z: torch.Tensor, in_block: int, row_block: int, scale: str, dtype: torch.dtype) -> Codes:
    """Codes ``[dim, rows']`` of ``z [rows, dim]``, rotated along either axis."""
    z = _rotated(z, in_block)
    if scale == "row":
        return Codes(*quantize_columns(z, row_block, dtype))
    codes = _one_scale(_rotated(_filled_up(z, row_block), row_block, axis=0), dtype)
    return Codes(transpose_codes(codes.codes), codes.scale)


def _one_scale(z: torch.Tensor, dtype: torch.dtype) -> Codes:
    amax = z.abs().amax().float() if z.numel() else z.new_zeros((), dtype=torch.float32)
    scale = scale_of(amax, dtype)
    return Codes(cast(z.float() / scale, dtype), scale)


def _rotated(z: torch.Tensor, block: int, axis: int = -1) -> torch.Tensor:
    return z if block == 1 else rotate(z, block, axis)


def _filled_up(z: torch.Tensor, block: int) -> torch.Tensor:
    """Zeros below, up to a multiple of the rotation's block."""
    missing = padded_rows(z.shape[0], block) - z.shape[0] if block > 1 else 0
    return torch.nn.functional.pad(z, (0, 0, 0, missing)) if missing else z
