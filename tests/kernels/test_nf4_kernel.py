"""Decoding NF4: the reference against bitsandbytes, and the kernel (interpreted where there is no GPU) against it."""

import bitsandbytes as bnb
import pytest
import torch
from lowprec_kernels.hadamard.reference import rotate, rotation_block
from lowprec_kernels.nf4 import cases, reference
from lowprec_kernels.nf4.reference import Packed
from lowprec_kernels.quantize_rows.reference import FP8, dequantize, padded_rows, quantize_columns, quantize_rows

from lowprec.testing import sqnr_db

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (FP8, torch.int8)
# The interpreter's e4m3 cast cuts, and halves what lies just under a power of two, which a level often does.
CUT_DB = 0.0 if DEVICE == "cuda" else 21.0


def packed(case: cases.Case) -> tuple[Packed, torch.Tensor]:
    """A weight in storage, and the values that went in."""
    w = torch.randn(case.rows, case.dim, generator=torch.Generator().manual_seed(case.dim)).to(DEVICE)
    w *= torch.logspace(-2, 1, case.rows, device=DEVICE)[:, None]  # blocks of very different scales
    data, state = bnb.functional.quantize_4bit(w, None, None, case.block_size, case.double_quant, "nf4")
    weight = Packed(data.reshape(-1), state.code, state.absmax, case.block_size)
    if case.double_quant:
        second = state.state2
        weight = weight._replace(absmax_levels=second.code, absmax_scale=second.absmax, absmax_offset=state.offset)
        weight = weight._replace(absmax_block=second.blocksize)
    return weight, w


def bitsandbytes_decodes(weight: Packed, case: cases.Case) -> torch.Tensor:
    absmax = reference.block_scales(weight)
    shape = (case.rows, case.dim)
    return torch.ops.bitsandbytes.dequantize_4bit(weight.packed, absmax, case.block_size, "nf4", shape, torch.float32)


@pytest.fixture
def kernel():
    return pytest.importorskip("lowprec_kernels.nf4.triton_kernel")


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_reference_is_bitsandbytes_decoding(case):
    weight, values = packed(case)
    found = reference.decode(weight, case.rows, case.dim)
    assert sqnr_db(values, found) > 15  # blocks here span rows of very different scales
    expected = bitsandbytes_decodes(weight, case)
    # bitsandbytes 0.50.2 decodes these wrongly on a processor: it begins a new block with every row.
    if DEVICE == "cuda" or case.dim % case.block_size == 0:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_values_of_the_kernel(kernel, case, dtype):
    weight, _ = packed(case)
    out, expected = (torch.full((case.rows, case.dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    kernel.decode_nf4(weight, case.rows, out)
    reference.decode_nf4(weight, case.rows, expected)
    torch.testing.assert_close(out, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    # A sum that is fused differs in the last bit at most; the interpreter cuts bf16 instead of rounding.
    assert sqnr_db(expected, out) > (60 if DEVICE == "cuda" or dtype != torch.bfloat16 else 45)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_codes_of_the_kernel_in_both_orientations(kernel, case, dtype, rotated):
    weight, _ = packed(case)
    plain = reference.decode(weight, case.rows, case.dim)
    cut = CUT_DB if dtype == FP8 else 0.0
    block = rotation_block(case.dim, 64) if rotated else 1
    if not rotated or block >= 16:
        z = rotate(plain.double(), block)
        expected, scale = quantize_rows(plain, block, dtype)
        codes = torch.empty_like(expected)
        kernel.decode_nf4(weight, case.rows, codes, scale, block)
        assert sqnr_db(z, dequantize(codes, scale)) >= sqnr_db(z, dequantize(expected, scale)) - 3 - cut
    block = min(rotation_block(case.rows, 32), 32) if rotated else 1
    if not rotated or block >= 16:
        padded = padded_rows(case.rows, block)
        expected, scale = quantize_columns(plain, block, dtype)
        codes = torch.full((case.dim, padded), 1, dtype=torch.int8, device=DEVICE).view(dtype)
        kernel.decode_nf4(weight, case.rows, codes, scale, 1, block, True)
        assert not codes[:, case.rows :].float().any() or block > 1
        z = torch.nn.functional.pad(plain.double(), (0, 0, 0, padded - case.rows))
        z = rotate(z, block, axis=0).t()
        assert sqnr_db(z, dequantize(codes, scale)) >= sqnr_db(z, dequantize(expected, scale)) - 3 - cut


@pytest.mark.parametrize("case", [cases.SMALL[3], cases.SMALL[4], cases.SMALL[5]], ids=str)
def test_programs_that_stay_for_several_tiles(kernel, case):
    weight, _ = packed(case)
    plain = reference.decode(weight, case.rows, case.dim)
    for few in (kernel.Settings((32, 64), 4, 1), kernel.Settings((32, 32), 4, 2)):
        values = torch.empty_like(plain)
        kernel.decode_nf4(weight, case.rows, values, settings=few)
        torch.testing.assert_close(values, plain, rtol=1e-6, atol=1e-6)
        for in_block, row_block, transposed in ((1, 1, False), (16, 1, False), (1, 1, True), (1, 16, True)):
            if transposed:
                expected, scale = quantize_columns(plain, row_block, torch.int8)
            else:
                expected, scale = quantize_rows(plain, in_block, torch.int8)
            codes = torch.full_like(expected, 99)
            kernel.decode_nf4(weight, case.rows, codes, scale, in_block, row_block, transposed, settings=few)
            difference = (codes.int() - expected.int()).abs()
            near = difference.max() <= 1 and difference.float().mean() < 0.05
            assert near, (few, in_block, row_block, transposed, (difference > 1).nonzero()[:5].tolist())


@pytest.mark.parametrize("double_quant", [False, True])
def test_rotation_over_several_blocks(kernel, double_quant):
    case = cases.Case(40, 256, 64, double_quant)
    weight, _ = packed(case)
    plain = reference.decode(weight, case.rows, case.dim)
    expected, scale = quantize_rows(plain, 128, torch.int8)
    codes = torch.empty_like(expected)
    kernel.decode_nf4(weight, case.rows, codes, scale, 128)
    assert (codes.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_by_scales_that_are_too_small_saturate(kernel, dtype):
    case = cases.Case(32, 64)
    weight, _ = packed(case)
    plain = reference.decode(weight, case.rows, case.dim)
    for transposed in (False, True):
        scale = plain.abs().amax(0 if transposed else 1) / 2000
        codes = torch.empty(plain.t().shape if transposed else plain.shape, dtype=dtype, device=DEVICE)
        expected = torch.empty_like(codes)
        kernel.decode_nf4(weight, case.rows, codes, scale, 1, 1, transposed)
        reference.decode_nf4(weight, case.rows, expected, scale, 1, 1, transposed)
        largest = expected.float().abs().max()
        assert codes.float().abs().max() == largest
        assert torch.equal(codes.float().abs() == largest, expected.float().abs() == largest)


def test_the_floor_counts_every_byte_once():
    case = cases.Case(4096, 4096)
    assert case.floor_bytes(2) / 4096**2 == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256 + 2)
    assert cases.Case(64, 64, double_quant=False).stored_bytes == 64 * 64 / 2 + 4 * 64
