"""Cross-entropy that leaves its gradient in the logits: the reference against autograd, the kernel against it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowprec_kernels.cross_entropy import cases, reference
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(case: cases.Case, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(case.rows, case.classes, generator=generator)
    targets = torch.randint(0, case.classes, (case.rows,), generator=generator)
    targets[0] = -100 if case.rows > 1 else targets[0]
    return logits.to(dtype).to(DEVICE), targets.to(DEVICE)


def plain(logits, targets, scale, softcap):
    z = logits.double() * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return F.cross_entropy(z, targets, ignore_index=-100, reduction="none")


@given(st.integers(1, 6), st.integers(2, 40), st.sampled_from([0.0, 5.0]), st.sampled_from([1.0, 0.25]))
def test_reference_is_autograd_s_gradient(rows, classes, softcap, scale):
    logits, targets = inputs(cases.Case(rows, classes), torch.float64)
    leaf = logits.clone().requires_grad_()
    expected = plain(leaf, targets, scale, softcap)
    expected.sum().backward()
    losses = reference.cross_entropy_(logits, targets, scale, softcap, True)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, leaf.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_kernel_matches_the_reference(case, dtype):
    kernel = pytest.importorskip("lowprec_kernels.cross_entropy.triton_kernel").cross_entropy_
    logits, targets = inputs(case, dtype)
    exact, mine, untouched = logits.double(), logits.clone(), logits.clone()
    expected = reference.cross_entropy_(exact, targets, case.scale, case.softcap, True)
    losses = kernel(mine, targets, case.scale, case.softcap, True)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    half_steps = 2 if DEVICE == "cpu" else 1  # the interpreter's casts cut instead of rounding to nearest
    rounding = half_steps * 2**-8 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(mine.double(), exact, rtol=rounding, atol=1e-6)
    assert torch.equal(kernel(untouched, targets, case.scale, case.softcap, False), losses)
    assert torch.equal(untouched, logits)


@pytest.mark.parametrize("run", ["reference", "triton_kernel"])
def test_a_bad_logit_is_not_hidden(run):
    module = pytest.importorskip(f"lowprec_kernels.cross_entropy.{run}")
    logits, targets = inputs(cases.Case(3, 20), torch.float32)
    logits[1, 3] = float("nan")
    logits[2, 4] = float("inf")
    losses = module.cross_entropy_(logits, targets, 1.0, 0.0, True)
    assert losses[0] == 0 and not losses[1:].isfinite().any()


def test_impossible_classes_cost_nothing():
    """Logits of -inf are classes that cannot be: probability 0, gradient 0."""
    kernel = pytest.importorskip("lowprec_kernels.cross_entropy.triton_kernel").cross_entropy_
    logits, targets = inputs(cases.Case(4, 9000), torch.float32)
    logits[:, 100:] = -float("inf")
    targets = targets % 100
    exact, mine = logits.double(), logits.clone()
    expected = reference.cross_entropy_(exact, targets, 1.0, 0.0, True)
    torch.testing.assert_close(kernel(mine, targets, 1.0, 0.0, True).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-6)
