"""The gated product and its gradients as codes: the reference against autograd and against the cast of what is rounded
first, the kernels (interpreted where there is no GPU) against it, and on a GPU against Liger's kernels, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowprec_kernels.gated_rows import cases, reference
from lowprec_kernels.quantize_rows.reference import FP8, dequantize, quantize_rows
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's e4m3 cast may lose the carry of a mantissa that is rounded up: 127.9 becomes 64.
CUT_DB = 0.0 if DEVICE == "cuda" else 20.0
PLAIN = {
    "SwiGLU": lambda gate, up: F.silu(gate) * up,
    "GeGLU": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}


def operands(rows: int, dim: int, dtype=torch.bfloat16, device: str = DEVICE) -> list[torch.Tensor]:
    """Error, gate and up."""
    generator = torch.Generator().manual_seed(0)
    factors = (1e-3, 2.0, 1.0)
    return [(factor * torch.randn(rows, dim, generator=generator)).to(dtype).to(device) for factor in factors]


def pair_of(rows: int, device: str = DEVICE) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(3)).to(device) + 0.5


@pytest.fixture
def kernel():
    return pytest.importorskip("lowprec_kernels.gated_rows.triton_kernel")


@given(st.integers(1, 5), st.sampled_from([16, 48]), st.sampled_from(reference.KINDS))
def test_reference_is_autograd_s_gradient(rows, dim, kind):
    error, gate, up = operands(rows, dim, torch.float64, "cpu")
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    expected = PLAIN[kind](*leaves)
    torch.testing.assert_close(reference.product(gate, up, kind), expected.detach(), rtol=1e-12, atol=1e-15)
    for found, wanted in zip(
        reference.gradients(error, gate, up, kind), torch.autograd.grad(expected, leaves, error), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_reference_casts_what_is_rounded_first(kind, dtype):
    error, gate, up = operands(7, 80, dtype, "cpu")
    pair = pair_of(7, "cpu")
    h = reference.product(gate, up, kind)
    assert h.dtype == dtype
    for found, expected in zip(reference.quantize_gated(gate, up, kind), quantize_rows(h, 1, FP8), strict=True):
        assert torch.equal(found.float(), expected.float())
    made = reference.gradients(error, gate, up, kind)
    assert all(gradient.dtype == dtype for gradient in made)
    found = reference.quantize_gated_gradients(error, gate, up, kind, pair)
    expected = [part for gradient in made for part in quantize_rows(gradient, 1, FP8, True, pair)]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_kernels_match_the_reference(kernel, case, dtype, kind):
    compare(kernel, operands(case.rows, case.dim, dtype), kind)


def db(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Signal to noise on the tensors' device, in dB; NaN where something is not finite."""
    return 10 * float((exact.square().sum() / (exact - found.double()).square().sum()).log10())


def compare(kernel, tensors, kind):
    error, gate, up = tensors
    rows = gate.shape[0]
    exact = [tensor.double() for tensor in tensors]
    wanted = (reference.product(*exact[1:], kind), *reference.gradients(*exact, kind))
    for partner in (None, pair_of(rows)):
        found = (
            *kernel.quantize_gated(gate, up, kind),
            *kernel.quantize_gated_gradients(error, gate, up, kind, partner),
        )
        expected = (
            *reference.quantize_gated(gate, up, kind),
            *reference.quantize_gated_gradients(error, gate, up, kind, partner),
        )
        for i, z in enumerate(wanted):
            (codes, scale), (slow_codes, slow_scale) = found[2 * i : 2 * i + 2], expected[2 * i : 2 * i + 2]
            rounding = 2**-6 if gate.dtype == torch.bfloat16 else 1e-5  # twice by one step
            # A largest of a row that lies at a power of two may be rounded to either side of it.
            near = ((scale / slow_scale - 1).abs() <= rounding) | (partner is not None and i > 0)
            assert near.all() and (scale / slow_scale - 1).abs().max() <= 1.01
            fast, slow = db(z, dequantize(codes, scale)), db(z, dequantize(slow_codes, slow_scale))
            assert slow > 28 and fast > slow - 3 - CUT_DB  # under twice the reference's error


def test_rows_with_strides_and_no_rows(kernel):
    error, gate, up = operands(6, 48)
    wide = torch.cat([gate, up, error], 1)
    parts = wide.split(48, 1)
    for kind in reference.KINDS:
        for found, expected in zip(
            (*kernel.quantize_gated(*parts[:2], kind), *kernel.quantize_gated_gradients(parts[2], *parts[:2], kind)),
            (*kernel.quantize_gated(gate, up, kind), *kernel.quantize_gated_gradients(error, gate, up, kind)),
            strict=True,
        ):
            assert torch.equal(found.float(), expected.float())
    empty = error[:0]
    for module in (reference, kernel):
        shapes = [t.shape for t in module.quantize_gated_gradients(empty, empty, empty, "SwiGLU")]
        assert shapes == [(0, 48), (0,)] * 2


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_infinity_mark_their_row_alone(kernel, kind, bad, which):
    tensors = operands(4, 64, torch.float32)
    tensors[which][2, 5] = bad
    error, gate, up = tensors
    for module in (reference, kernel):
        results = module.quantize_gated_gradients(error, gate, up, kind, pair_of(4))
        pairs = [results[:2], results[2:], *([] if which == 0 else [module.quantize_gated(gate, up, kind)])]
        marked = [not (scale[2] * codes[2].float()).sum().isfinite() for codes, scale in pairs]
        assert marked[0] and all(marked[2:]) and (marked[1] or which == 2)  # dU does not depend on U
        assert all(dequantize(codes, scale)[[0, 1, 3]].isfinite().all() for codes, scale in pairs)


@pytest.mark.parametrize("kind", reference.KINDS)
def test_zeros_and_saturated_gates(kernel, kind):
    error, gate, up = operands(3, 32, torch.float32)
    gate[0], up[1] = 0, 0
    gate[2, :16], gate[2, 16:] = 80.0, -80.0
    for module in (reference, kernel):
        h = dequantize(*module.quantize_gated(gate, up, kind))
        assert h.isfinite().all() and not h[:2].any() and h[2, :16].any()
        results = module.quantize_gated_gradients(error, gate, up, kind)
        assert all(dequantize(*pair).isfinite().all() for pair in (results[:2], results[2:]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("rows,dim", [(8192, 8192), (4096, 14336), (33, 8208), (1, 32768)])
def test_large_rows_on_the_gpu(kernel, rows, dim, kind):
    compare(kernel, operands(rows, dim), kind)


def by_liger(error, gate, up, kind):
    """H, dG, dU."""
    import liger_kernel.ops as ops

    function = {"SwiGLU": ops.LigerSiLUMulFunction, "GeGLU": ops.LigerGELUMulFunction}[kind]
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = function.apply(gate.clone(), up.clone())  # its backward overwrites what it was given
    return h.detach(), *torch.autograd.grad(h, (gate, up), error)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows,dim", [(512, 8192), (256, 14336), (33, 336)])
def test_codes_are_those_of_liger_s_results(kernel, rows, dim, dtype, kind):
    """Bit for bit, the casts' kernel after Liger's."""
    pytest.importorskip("liger_kernel")
    cast = pytest.importorskip("lowprec_kernels.quantize_rows.triton_kernel").quantize_rows
    error, gate, up = operands(rows, dim, dtype)
    pair = pair_of(rows)
    h, *gradients = by_liger(error, gate, up, kind)
    expected = [*cast(h, 1, FP8), *(part for grad in gradients for part in cast(grad, 1, FP8, True, pair))]
    found = (
        *kernel.quantize_gated(gate, up, kind),
        *kernel.quantize_gated_gradients(error, gate, up, kind, pair),
    )
    differing = [int((a.float() != b.float()).sum()) for a, b in zip(found, expected, strict=True)]
    assert differing == [0] * 6


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_they_see_new_values(kernel):
    error, gate, up = operands(64, 8192)
    pair = pair_of(64)

    def run():
        return (
            *kernel.quantize_gated(gate, up, "SwiGLU"),
            *kernel.quantize_gated_gradients(error, gate, up, "SwiGLU", pair),
        )

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in (error, gate, up):
        tensor.mul_(-0.5)
    expected = run()
    graph.replay()
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(captured, expected, strict=True))
