"""The grouped product's reference: each row times the matrix of its own group, whatever the groups' sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowprec_kernels.quantize_rows.reference import FP8, dequantize, quantize_rows
from lowprec_kernels.scaled_grouped_matmul import cases
from lowprec_kernels.scaled_grouped_matmul.reference import scaled_grouped_matmul

from lowprec.testing import sqnr_db


def check(case: cases.Case) -> None:
    generator = torch.Generator().manual_seed(0)
    groups, rows = len(case.sizes), sum(case.sizes)
    a, scale_a = quantize_rows(torch.randn(rows, case.k, generator=generator), 1, FP8)
    b, scale_b = quantize_rows(torch.randn(groups * case.n, case.k, generator=generator), 1, FP8)
    b, scale_b = b.view(groups, case.n, case.k), scale_b.view(groups, case.n)
    sizes = torch.tensor(case.sizes)
    ends, group_of = sizes.cumsum(0).int(), torch.arange(groups).repeat_interleave(sizes)
    matrices = b.double() * scale_b.double()[..., None]
    exact = torch.einsum("mk,mnk->mn", dequantize(a, scale_a.double()), matrices[group_of])
    fp64 = scaled_grouped_matmul(a, scale_a.double(), b, scale_b.double(), ends, torch.float64)
    torch.testing.assert_close(fp64, exact)
    found = scaled_grouped_matmul(a, scale_a, b, scale_b, ends, torch.float32)
    assert found.shape == (rows, case.n) and (rows == 0 or sqnr_db(exact, found) > 110)


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_products(case):
    check(case)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.sampled_from([16, 48]), st.sampled_from([16, 32]))
def test_any_sizes_of_groups(sizes, n, k):
    check(cases.Case(tuple(sizes), n, k))


def test_a_bad_number_stays_in_its_row():
    a, scale_a = quantize_rows(torch.tensor([[1.0] * 16, [float("nan")] * 16, [2.0] * 16]), 1, FP8)
    b, scale_b = torch.ones(2, 16, 16).to(FP8), torch.ones(2, 16)
    y = scaled_grouped_matmul(a, scale_a, b, scale_b, torch.tensor([2, 3], dtype=torch.int32), torch.float32)
    assert y.isnan().all(1).tolist() == [False, True, False]
