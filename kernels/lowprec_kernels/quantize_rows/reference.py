"""Rotate, find the largest magnitude, scale, saturate, cast: the definitions.

A matrix Z [rows, dim] is stored as 8-bit codes with fp32 scales. Two orientations:

- ``quantize_rows``: codes [rows, dim], one scale a row. For products that contract over ``dim``.
- ``quantize_columns``: codes transposed, [dim, rows'], one scale a column of Z. For the gradient products, which
  contract over the rows of Z: the tensor cores read 8-bit operands along the contraction only.

``transpose_codes`` gives the second orientation of codes that exist already. Row scales that are powers of two fold
into e4m3 codes without a rounding (as long as nothing underflows), so nothing is quantised twice.

A scale is amax / 448 for e4m3, amax / 127 for int8. amax has a floor, so that zeros give zeros; NaN or infinity in a
row makes its scale NaN or infinite, so that every product with it is NaN (int8 codes could not say so).
"""

import torch

from lowprec_kernels.hadamard.reference import rotate

FP8 = torch.float8_e4m3fn
LARGEST_CODE = {FP8: 448.0, torch.int8: 127.0}
AMAX_FLOOR = 1e-30
"""Rows whose largest magnitude is below this become zeros: 1 / scale must stay finite in fp32."""

TINY = 2.0**-100
"""Floor of scales and of their products with a partner's: away from fp32's subnormals."""


def scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The factor that takes codes back to values. NaN and infinity pass through."""
    return amax.clamp_min(AMAX_FLOOR) / LARGEST_CODE[dtype]


def power_of_two_above(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is at least ``scale`` (positive); NaN and infinity pass through."""
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(scale.isfinite(), rounded, scale)


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to nearest even and saturate. NaN stays NaN in e4m3 and becomes 0 in int8."""
    limit = LARGEST_CODE[dtype]
    if dtype == torch.int8:
        return values.round().clamp(-limit, limit).nan_to_num(0.0).to(torch.int8)
    return values.float().clamp(-limit, limit).to(dtype)


def quantize_rows(
    x: torch.Tensor,
    block: int,
    dtype: torch.dtype,
    power_of_two: bool = False,
    partner: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[rows, dim]`` and scales ``[rows]`` of ``x [rows, dim]`` rotated along ``dim`` in blocks of ``block``.

    With ``power_of_two`` each scale is raised to a power of two, or with ``partner [rows]`` (positive) until scale x
    partner is one. It costs e4m3 no precision, and makes the factors that ``transpose_codes`` folds exact.
    """
    z = rotate(_wide(x), block)
    amax = z.abs().amax(-1) if z.shape[-1] else z.new_zeros(z.shape[0])
    scale = scale_of(amax, dtype)
    if power_of_two:
        partner = torch.ones_like(scale) if partner is None else partner
        scale = (power_of_two_above((scale * partner).clamp_min(TINY)) / partner).clamp_min(TINY)
    return cast(z / scale[:, None], dtype), scale


def quantize_columns(
    x: torch.Tensor, block: int, dtype: torch.dtype, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[dim, rows']`` and scales ``[dim]`` of ``x [rows, dim]`` rotated along the rows in blocks of ``block``.

    rows' is rows filled up with zeros to a multiple of ``block`` and of 16. With ``scale`` given it is used as it is.
    """
    rows, dim = x.shape
    padding = padded_rows(rows, block) - rows
    z = rotate(torch.nn.functional.pad(_wide(x), (0, 0, 0, padding)), block, axis=0)
    if scale is None:
        scale = scale_of(z.abs().amax(0) if z.shape[0] else z.new_zeros(dim), dtype)
    return cast(z / scale, dtype).t().contiguous(), scale


def transpose_codes(codes: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """``codes [rows, dim]`` as ``[dim, rows']``, each row multiplied by its ``factor`` (e4m3 only); zeros fill up rows.

    Factors are powers of two at most 1: then only codes that underflow are rounded.
    """
    rows = codes.shape[0]
    out = codes
    if factor is not None:
        assert codes.dtype == FP8, "int8 codes cannot take a factor without a second rounding"
        out = cast(codes.to(factor.dtype) * factor[:, None], codes.dtype)
    padding = (0, 0, 0, padded_rows(rows, 1) - rows)
    return torch.nn.functional.pad(out.view(torch.int8), padding).t().contiguous().view(codes.dtype)


def fold_scales(
    scale: torch.Tensor, partner: torch.Tensor | None = None, copies: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """What becomes of scales ``[rows]`` of rows that a product sums over, times those of the other operand's same rows
    (``partner``): a factor for each row's codes, at most 1, and the largest, which scales the product, ``copies`` times
    (1 where there are no rows)."""
    product = scale if partner is None else scale * partner
    largest = product.amax() if product.numel() else product.new_ones(())
    return product / largest, largest.expand(copies).contiguous()


def requantize_columns(
    codes: torch.Tensor, scale: torch.Tensor, in_block: int, row_block: int, column_scale: torch.Tensor
) -> torch.Tensor:
    """``quantize_columns`` of what row-wise codes ``[rows, dim]`` stand for: decoded, un-rotated along ``dim``, rotated
    along the rows and cast with the scales ``column_scale [dim]``, which are known: codes ``[dim, rows']``."""
    z = rotate(dequantize(codes, scale), in_block)
    return quantize_columns(z, row_block, codes.dtype, column_scale)[0]


def padded_rows(rows: int, block: int) -> int:
    """``rows`` filled up to a multiple of the rotation's block and of the 16 that 8-bit products need."""
    multiple = max(block, 16)
    return -(-rows // multiple) * multiple


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes ``[rows, dim]`` times the scales of their rows (or one scale), in the scales' dtype: still rotated."""
    return codes.to(scale.dtype) * scale.reshape(-1, 1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
