"""RMSNorm's gradients: the reference against autograd, the kernel (interpreted where there is no GPU) against it, and
on a GPU the whole norm against fp64 beside Liger's."""

from inspect import getsource, signature

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowprec_kernels.rms_norm import PARTIAL_SUMS, cases, num_programs, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def operands(rows, dim, dtype=torch.bfloat16, weight_dtype=None, device=DEVICE):
    """Gradient, input, weight and 1 / rms of each row."""
    generator = torch.Generator().manual_seed(0)
    grad, x = ((factor * torch.randn(rows, dim, generator=generator)).to(dtype) for factor in (1e-3, 2.0))
    weight = torch.randn(dim, generator=generator).to(weight_dtype or dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return tuple(t.to(device) for t in (grad, x, weight, torch.rsqrt(x.to(wide).square().mean(-1) + EPS)))


def db(exact, found):
    return 10 * float((exact.double().square().sum() / (exact.double() - found.double()).square().sum()).log10())


@pytest.fixture
def kernel():
    return pytest.importorskip("lowprec_kernels.rms_norm.triton_kernel").rms_norm_backward


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.0, 1.0]))
def test_reference_is_autograd_s_gradient(rows, dim, offset):
    grad, x, weight, rstd = operands(rows, dim, torch.float64, device="cpu")
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = (weight + offset) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    expected = torch.autograd.grad(y, leaves, grad)
    found = reference.rms_norm_backward(grad, x.detach(), weight.detach(), rstd.detach(), offset, True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_kernel_matches_the_reference(kernel, case, dtype, weight_grad):
    grad, x, weight, rstd = operands(case.rows, case.dim, dtype, torch.float32)
    dx, dw = kernel(grad, x, weight, rstd, 1.0, weight_grad)
    expected = reference.rms_norm_backward(*(t.double() for t in (grad, x, weight, rstd)), 1.0, True)
    assert dx.dtype == dtype and db(expected[0], dx) > {torch.float32: 120, torch.float16: 60}.get(dtype, 48)
    assert (dw.shape == (0,)) if not weight_grad else db(expected[1], dw) > 120


@pytest.mark.parametrize("rows", [0, 1, 531])
def test_any_number_of_rows_with_more_than_the_programs(kernel, rows):
    grad, x, weight, rstd = operands(rows, 2048, torch.float32)
    dx, dw = kernel(grad, x, weight, rstd, 0.0, True)
    expected = reference.rms_norm_backward(grad, x, weight, rstd, 0.0, True)
    torch.testing.assert_close(dx, expected[0], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(dw, expected[1], rtol=1e-4, atol=1e-7)


def test_a_nan_stays_one_and_in_its_row(kernel):
    grad, x, weight, rstd = operands(5, 64)
    x[2, 3] = float("nan")
    rstd[2] = float("nan")
    dx, dw = kernel(grad, x, weight, rstd, 0.0, True)
    assert dx[2].isnan().all() and dx[[0, 1, 3, 4]].isfinite().all() and dw.isnan().all()


@given(st.integers(1, 10**6), st.integers(1, 16384), st.sampled_from([1, 4, 24, 132]))
def test_partial_sums_are_bounded(rows, dim, cores):
    programs = num_programs(rows, dim, cores)
    assert 1 <= programs <= rows and programs * dim <= cores * max(PARTIAL_SUMS, dim)


def test_liger_s_forward_takes_and_gives_what_the_norm_relies_on():
    ops = pytest.importorskip("liger_kernel.ops.rms_norm")
    assert list(signature(ops.rms_norm_forward).parameters) == ["X", "W", "eps", "offset", "casting_mode", "row_mode"]
    assert getsource(ops.rms_norm_forward).rstrip().splitlines()[-1].split()[:5] == (
        ["return", "Y.view(*shape),", "X,", "RSTD,", "BLOCK_SIZE,"]
    )


def test_gradients_of_gradients_are_refused(monkeypatch):
    from lowprec.fused import norm

    ops = pytest.importorskip("liger_kernel.ops.rms_norm")
    monkeypatch.setattr(ops, "rms_norm_forward", lambda x, *rest: (x.clone(), x, x.square().mean(-1).rsqrt()))
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    (first,) = torch.autograd.grad(
        norm.RMSNorm.apply(x, weight, norm.Variant(0.0, "llama", EPS)).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize(("offset", "casting"), [(0.0, "llama"), (1.0, "gemma")])
@pytest.mark.parametrize("case", cases.LARGE, ids=str)
def test_the_norm_is_no_less_exact_than_liger_s(case, offset, casting):
    from liger_kernel.ops import LigerRMSNormFunction

    from lowprec.fused.norm import RMSNorm, Variant

    grad, x, weight, _ = operands(case.rows, case.dim)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    normed = exact[0] * torch.rsqrt(exact[0].square().mean(-1, keepdim=True) + EPS)
    ((exact[1] + offset) * normed).backward(grad.double())
    ways = {
        "ours": lambda x, weight: RMSNorm.apply(x, weight, Variant(offset, casting, EPS)),
        "liger": lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, offset, casting, False, None),
    }
    noise = {}
    for name, way in ways.items():
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        way(*leaves).backward(grad)
        noise[name] = [db(e.grad, leaf.grad) for e, leaf in zip(exact, leaves, strict=True)]
    assert all(a > b - 0.5 for a, b in zip(noise["ours"], noise["liger"], strict=True)), noise
