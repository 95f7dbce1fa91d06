"""The norm of a gradient with its flag: the kernel (interpreted where there is no GPU) against fp64."""

import os

import pytest
import torch
from lowprec_kernels.gradient_norm import cases, reference

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel's module is imported
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(x, found_inf=0.0, scratch=None):
    kernel = pytest.importorskip("lowprec_kernels.gradient_norm.triton_kernel")
    scratch = kernel.make_scratch(x.device) if scratch is None else scratch
    norms, flag = torch.full((3,), -1.0, device=DEVICE), torch.tensor(found_inf, device=DEVICE)
    kernel.norm_(x, norms[1], flag, scratch)
    assert norms[0] == norms[2] == -1 and scratch[0] == 0
    return norms[1], flag


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("numel", cases.NUMELS)
def test_kernel_matches_the_reference(numel, dtype):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    exact, untouched = torch.zeros((), dtype=torch.float64, device=DEVICE), torch.zeros((), device=DEVICE)
    reference.norm_(x, exact, untouched)
    norm, flag = run(x)
    # Each square, and each of the sums that one passes through, is off by 2^-24 at most; the root halves that.
    assert (norm.double() / exact - 1).abs() < 16 * 2**-24 and flag == untouched == 0
    assert torch.equal(exact, x.double().norm())


def test_parts_are_added_in_one_order(monkeypatch):
    """More tiles than programs, launches one after another over one scratch, and a flag that is up already."""
    kernel = pytest.importorskip("lowprec_kernels.gradient_norm.triton_kernel")
    x = torch.randn(5 * kernel.TILE + 77, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    monkeypatch.setattr(kernel, "PROGRAMS", 4)
    scratch = kernel.make_scratch(x.device)
    first, flag = run(x, 1.0, scratch)
    assert flag == 1 and (first.double() / x.double().norm() - 1).abs() < 16 * 2**-24
    run(x[:100], scratch=scratch)
    assert all(torch.equal(run(x, scratch=scratch)[0], first) for _ in range(10 if DEVICE == "cuda" else 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("place", [0, 4096, 8999])
def test_a_bad_element_raises_the_flag(bad, place):
    """Among them one whose square is infinite."""
    x = torch.zeros(9000, device=DEVICE, dtype=torch.bfloat16)
    x[place] = bad
    norm, flag = run(x)
    expected, raised = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
    reference.norm_(x, expected, raised)
    assert flag == raised == 1 and not norm.isfinite() and norm.isnan() == expected.isnan()
