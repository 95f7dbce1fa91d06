"""The scaled product: the reference against fp64, the kernels (interpreted where there is no GPU) against the
reference."""

import pytest
import torch
from lowprec_kernels.quantize_rows.reference import FP8, dequantize, quantize_rows
from lowprec_kernels.scaled_matmul import cases, reference

from lowprec.testing import sqnr_db

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAST_DB = 50 if DEVICE == "cuda" else 45
"""Of a result rounded once to bf16; the interpreter cuts the bits off."""
TILE = {} if DEVICE == "cuda" else {"tile": (32, 32, 64)}


def operands(case: cases.Case, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    a = quantize_rows(torch.randn(case.m, case.k, generator=generator), 1, dtype)
    b = quantize_rows(torch.randn(case.n, case.k, generator=generator), 1, dtype)
    return [t.to(DEVICE) for t in (*a, *b, torch.randn(case.n, generator=generator))]


@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_products(case, dtype):
    a, sa, b, sb, bias = operands(case, dtype)
    exact = dequantize(a, sa.double()) @ dequantize(b, sb.double()).t() + bias.double()
    fp64 = reference.scaled_matmul(a, sa.double(), b, sb.double(), bias, torch.float64)
    torch.testing.assert_close(fp64, exact)
    assert sqnr_db(exact, reference.scaled_matmul(a, sa, b, sb, bias, torch.float32)) > 110
    kernel = pytest.importorskip("lowprec_kernels.scaled_matmul.triton_kernel")
    hopper = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    for run in (kernel.scaled_matmul, *([kernel.persistent_scaled_matmul] if hopper else [])):
        found = run(a, sa, b, sb, bias, torch.bfloat16, **TILE)
        # int8 sums are exact; e4m3 tensor cores keep about 14 bits of them
        assert sqnr_db(exact, found) > 45
        one = torch.ones((), device=DEVICE)
        found = run(a, one, b, one, None, torch.bfloat16, **TILE)
        assert sqnr_db(a.double() @ b.double().t(), found) > 45


def low_rank(case: cases.Case, rank: int, up_dtype: torch.dtype):
    """L as one of the slices that LoRA layers of one input share, and B."""
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(case.m, 2 * rank + 3, generator=generator).bfloat16().to(DEVICE)[:, rank : 2 * rank]
    return low, torch.randn(case.n, rank, generator=generator).to(DEVICE, up_dtype)


@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("up_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case,rank", zip(cases.SMALL, (1, 8, 64, 16), strict=True), ids=str)
def test_a_term_of_low_rank_is_added_before_the_result_is_rounded(case, rank, up_dtype, dtype):
    a, sa, b, sb, bias = operands(case, dtype)
    low, up = low_rank(case, rank, up_dtype)
    rounded = up.to(low.dtype).double()
    term = low.double() @ rounded.t()
    exact = dequantize(a, sa.double()) @ dequantize(b, sb.double()).t() + term
    fp64 = reference.scaled_matmul(a, sa.double(), b, sb.double(), None, torch.float64, False, low, up)
    torch.testing.assert_close(fp64, exact)
    kernel = pytest.importorskip("lowprec_kernels.scaled_matmul.triton_kernel")
    hopper = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    for run in (kernel.scaled_matmul, *([kernel.persistent_scaled_matmul] if hopper else [])):
        found = run(a, sa, b, sb, None, torch.bfloat16, True, low, up, **TILE)
        assert sqnr_db(exact, found) > LEAST_DB
        found = run(a, sa, b, sb, bias, torch.bfloat16, True, low, up, **TILE)
        assert sqnr_db(exact + bias.double(), found) > LEAST_DB


def test_an_empty_sum_is_the_term_of_low_rank():
    kernel = pytest.importorskip("lowprec_kernels.scaled_matmul.triton_kernel")
    a, b = torch.empty(3, 0, dtype=torch.int8, device=DEVICE), torch.empty(16, 0, dtype=torch.int8, device=DEVICE)
    low, up = low_rank(cases.Case(3, 16, 0), 4, torch.float32)
    for run in (kernel.scaled_matmul, kernel.persistent_scaled_matmul):
        one = torch.ones((), device=DEVICE)
        found = run(a, one, b, one, None, torch.bfloat16, True, low, up)
        assert torch.equal(found, low @ up.bfloat16().t())


def test_an_empty_sum_is_the_bias():
    kernel = pytest.importorskip("lowprec_kernels.scaled_matmul.triton_kernel")
    a, b = torch.empty(3, 0, dtype=torch.int8, device=DEVICE), torch.empty(16, 0, dtype=torch.int8, device=DEVICE)
    ones, bias = torch.ones(3, device=DEVICE), torch.arange(16.0, device=DEVICE)
    for run in (reference.scaled_matmul, kernel.scaled_matmul, kernel.persistent_scaled_matmul):
        assert torch.equal(run(a, ones, b, torch.ones(16, device=DEVICE), bias, torch.float32), bias.expand(3, 16))
