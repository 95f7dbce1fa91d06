"""The casts: properties of the reference in fp64, and the kernels (interpreted where there is no GPU) against it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowprec_kernels.hadamard.reference import rotate
from lowprec_kernels.quantize_rows import cases, reference
from lowprec_kernels.quantize_rows.reference import FP8, LARGEST_CODE, dequantize

from lowprec.testing import sqnr_db

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (FP8, torch.int8)
# The interpreter's e4m3 cast cuts instead of rounding to nearest, which costs 6 dB and half a step.
CUT_DB = 0.0 if DEVICE == "cuda" else 10.0


def normal(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


@pytest.fixture
def kernel():
    return pytest.importorskip("lowprec_kernels.quantize_rows.triton_kernel")


@pytest.fixture
def fold_kernel():
    return pytest.importorskip("lowprec_kernels.quantize_rows.fold_kernel")


@settings(max_examples=200)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16), st.booleans())
def test_reference_saturates_and_stays_within_half_a_step(values, power_of_two):
    x = torch.tensor([values], dtype=torch.float64).clamp(-1e30, 1e30)
    for dtype in DTYPES:
        codes, scale = reference.quantize_rows(x, 1, dtype, power_of_two)
        assert codes.float().abs().max() <= LARGEST_CODE[dtype] and scale.isfinite().all() and (scale > 0).all()
        error = (dequantize(codes, scale) - x).abs()
        # e4m3: 3 bits of mantissa, and 2^-10 of the scale below its normal numbers; int8: half a step
        bound = torch.maximum(x.abs() * 2**-4, scale[:, None] * 2**-10) if dtype == FP8 else 0.5 * scale[:, None]
        assert (error <= bound * (1 + 1e-9) + 1e-30).all()


@settings(max_examples=200)
@given(st.floats(2.0**-60, 2.0**90), st.floats(2.0**-20, 2.0**20))
def test_power_of_two_scales(amax, partner):
    x = torch.full((1, 16), amax, dtype=torch.float64)
    pair = torch.tensor([partner], dtype=torch.float64)
    exact = reference.quantize_rows(x, 1, FP8)[1]
    for scale, product in (
        (s := reference.quantize_rows(x, 1, FP8, True)[1], s),
        (s := reference.quantize_rows(x, 1, FP8, True, pair)[1], s * pair),
    ):
        assert (exact <= scale * (1 + 1e-12)).all() and (scale <= exact * (2 + 1e-9)).all()
        log = product.log2()
        assert (log - log.round()).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_rows_kernel_matches_the_reference(kernel, case, dtype):
    x = normal(case.rows, case.dim)
    pair = torch.rand(case.rows, generator=torch.Generator().manual_seed(3)).to(DEVICE) + 0.5
    z = rotate(x.double(), case.block)
    for power_of_two, partner in ((False, None), (True, None), (True, pair)):
        codes, scale = kernel.quantize_rows(x, case.block, dtype, power_of_two, partner)
        expected, expected_scale = reference.quantize_rows(x, case.block, dtype, power_of_two, partner)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
        fast, slow = sqnr_db(z, dequantize(codes, scale)), sqnr_db(z, dequantize(expected, expected_scale))
        assert fast > slow - 3 - (CUT_DB if dtype == FP8 else 0)  # under twice the reference's error
        if not power_of_two:
            assert slow > cases.NOISE_FLOOR_DB[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize("rows,dim", [(1, 16), (75, 80), (600, 48)])
def test_columns_kernel_matches_the_reference(kernel, rows, dim, block, dtype):
    x = normal(rows, dim)
    codes, scale = kernel.quantize_columns(x, block, dtype)
    expected, expected_scale = reference.quantize_columns(x, block, dtype)
    assert codes.shape == expected.shape == (dim, reference.padded_rows(rows, block))
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    cut = CUT_DB if dtype == FP8 else 0
    assert sqnr_db(dequantize(expected, expected_scale), dequantize(codes, scale)) > 60 - cut * 4
    given_scale = 1.7 * expected_scale
    again = kernel.quantize_columns(x, block, dtype, given_scale)[0]
    expected = reference.quantize_columns(x, block, dtype, given_scale)[0]
    assert sqnr_db(dequantize(expected, given_scale), dequantize(again, given_scale)) > 45 - cut * 3


@pytest.mark.parametrize("in_block,row_block", [(64, 32), (1, 32), (64, 1), (16, 16), (256, 32), (256, 1)])
def test_requantize_kernel_matches_the_reference(in_block, row_block):
    kernel = pytest.importorskip("lowprec_kernels.quantize_rows.requantize_kernel")
    x = normal(560, 768 if in_block == 256 else 192)  # more tiles than programs
    codes, scale = reference.quantize_rows(x, in_block, torch.int8)
    column_scale = reference.quantize_columns(x, row_block, torch.int8)[1]
    found = kernel.requantize_columns(codes, scale, in_block, row_block, column_scale)
    expected = reference.requantize_columns(codes, scale, in_block, row_block, column_scale)
    assert found.shape == expected.shape
    assert sqnr_db(dequantize(expected, column_scale), dequantize(found, column_scale)) > 40
    plain = reference.quantize_columns(x.double(), row_block, torch.int8, column_scale.double())[0]
    assert sqnr_db(dequantize(plain, column_scale.double()), dequantize(found, column_scale)) > 35


@pytest.mark.parametrize("rows,dim", [(1, 16), (70, 48), (129, 200)])
def test_transposition_is_exact(kernel, rows, dim):
    for dtype in DTYPES:
        codes = reference.quantize_rows(normal(rows, dim), 1, dtype)[0]
        found = kernel.transpose_codes(codes)
        assert torch.equal(found.view(torch.int8), reference.transpose_codes(codes).view(torch.int8))
        assert torch.equal(found[:, :rows].t().contiguous().view(torch.int8), codes.view(torch.int8))
        assert not found[:, rows:].view(torch.int8).any()


def test_powers_of_two_fold_exactly_where_nothing_underflows(kernel):
    codes = reference.quantize_rows(normal(64, 48), 1, FP8)[0]
    codes = torch.where(codes.float().abs() >= 1, codes.float(), 1.0).to(FP8)
    factor = torch.exp2(-(torch.arange(64, device=DEVICE).float() % 7))
    for transpose in (reference.transpose_codes, kernel.transpose_codes):
        folded = transpose(codes, factor)
        assert torch.equal(folded.float(), (codes.float() * factor[:, None]).t())


@pytest.mark.parametrize("rows", [1, 40, 4096, 5000])
@pytest.mark.parametrize("partner", [False, True])
@pytest.mark.parametrize("special", [None, float("nan"), float("inf")])
def test_scales_fold_to_the_same_bits(fold_kernel, rows, partner, special):
    scale, other = (torch.exp2(normal(rows, 16)[:, 0].float()) for _ in range(2))
    if special is not None:
        scale[rows // 2] = special
    other = other if partner else None
    for found, expected in zip(
        fold_kernel.fold_scales(scale, other, 3), reference.fold_scales(scale, other, 3), strict=True
    ):
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    if special is None:
        factor, largest = reference.fold_scales(scale, other)
        assert factor.max() == 1 and largest.shape == (1,)
        torch.testing.assert_close(factor * largest, scale if other is None else scale * other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 16, 256])
def test_zeros_huge_and_tiny_rows(kernel, dtype, block):
    x = torch.zeros(5, 256)
    x[1], x[2], x[3, 0] = 3.0, 1e30, 1e-38
    x[4] = torch.finfo(torch.float32).smallest_normal / 4
    for quantize, where in ((reference.quantize_rows, "cpu"), (kernel.quantize_rows, DEVICE)):
        codes, scale = quantize(x.bfloat16().to(where), block, dtype)
        values = dequantize(codes, scale)
        assert values.isfinite().all() and not values[[0, 3, 4]].any()
        assert sqnr_db(rotate(x[1:3].bfloat16().double(), block), values[1:3]) > 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_mark_their_row_alone(kernel, dtype, bad):
    x = normal(4, 64).float()
    x[2, 5] = bad
    for quantize in (reference.quantize_rows, kernel.quantize_rows):
        codes, scale = quantize(x, 16, dtype)
        assert not (scale[2] * codes[2].float()).sum().isfinite()
        assert dequantize(codes, scale)[[0, 1, 3]].isfinite().all()
    for quantize in (reference.quantize_columns, kernel.quantize_columns):
        assert not quantize(x, 1, dtype)[1][5].isfinite()


def test_empty_matrices(kernel):
    for module in (reference, kernel):
        codes, scale = module.quantize_rows(torch.empty(0, 32, device=DEVICE), 16, torch.int8)
        assert codes.shape == (0, 32) and scale.shape == (0,)
        codes, scale = module.quantize_columns(torch.empty(0, 32, device=DEVICE), 16, torch.int8)
        assert codes.shape == (32, 0) and scale.shape == (32,)
