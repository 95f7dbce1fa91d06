"""The look-up in a table on the host: the reference against F.embedding, the kernel (interpreted where there is no GPU)
against it, bit for bit."""

import pytest
import torch
from lowprec_kernels.host_rows import cases, reference
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(case: cases.Case, dtype=torch.bfloat16, ids=torch.int64):
    """Ids on the device, and a table in memory that it reads."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.vocab, case.dim, generator=generator).to(dtype)
    weight[0, 0] = float("nan")
    chosen = torch.randint(0, case.vocab, (case.tokens,), generator=generator).to(DEVICE, ids)
    return chosen, weight.pin_memory() if DEVICE == "cuda" else weight


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    return torch.equal(found.cpu().view(torch.uint8), expected.cpu().view(torch.uint8))


@pytest.fixture
def kernel():
    return pytest.importorskip("lowprec_kernels.host_rows.triton_kernel")


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_rows_are_those_of_the_table_bit_for_bit(kernel, case, dtype, ids):
    chosen, weight = operands(case, dtype, ids)
    expected = F.embedding(chosen.cpu(), weight)
    for module in (reference, kernel):
        found = module.gather_host_rows(chosen, weight)
        assert found.device.type == DEVICE and same(found, expected)


@pytest.mark.parametrize("bad", [-1, 272, -(2**40), 2**40])
def test_an_id_outside_the_table_gives_nan_in_its_row_alone(kernel, bad):
    chosen, weight = operands(cases.Case(4, 272, 80))
    weight[0, 0] = 0
    chosen[2] = bad
    for module in (reference, kernel):
        found = module.gather_host_rows(chosen, weight)
        assert found[2].isnan().all() and found[[0, 1, 3]].isfinite().all()


def test_shapes_and_strides_of_ids(kernel):
    chosen, weight = operands(cases.Case(24, 16, 32))
    for ids in (chosen.view(4, 6), chosen.view(4, 6).t(), chosen[0], chosen[:0]):
        for module in (reference, kernel):
            assert same(module.gather_host_rows(ids, weight), F.embedding(ids.cpu(), weight))


@pytest.mark.gpu
def test_rows_of_a_large_table(kernel):
    chosen, weight = operands(cases.LARGE[0])
    assert same(kernel.gather_host_rows(chosen, weight), F.embedding(chosen.cpu(), weight))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_it_sees_new_ids(kernel):
    chosen, weight = operands(cases.Case(64, 272, 128))
    kernel.gather_host_rows(chosen, weight)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.gather_host_rows(chosen, weight)
    chosen.copy_(chosen.flip(0))
    graph.replay()
    assert same(captured, F.embedding(chosen.cpu(), weight))
