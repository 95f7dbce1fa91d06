"""The rotation against its matrix in fp64, and the kernel (interpreted where there is no GPU) against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowprec_kernels.hadamard import cases, reference

from lowprec.testing import sqnr_db

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("order", [1, 2, 16, 64, 512])
def test_matrix_is_orthonormal_and_symmetric(order):
    h = reference.hadamard_matrix(order)
    assert torch.equal(h, h.t())
    torch.testing.assert_close(h @ h.t(), torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-12)
    assert h.abs().unique().numel() == 1


@given(st.integers(1, 40000), st.sampled_from([1, 16, 64, 128, 512]))
def test_block_divides_the_dimension(dim, largest):
    block = reference.rotation_block(dim, largest)
    assert dim % block == 0 and block <= largest and block & (block - 1) == 0
    assert block == largest or dim % (2 * block)


@pytest.mark.parametrize("dim,block", [(576, 64), (1536, 64), (14336, 64), (4864, 64), (18944, 64), (50, 2)])
def test_blocks_of_real_widths(dim, block):
    assert reference.rotation_block(dim) == block


def test_rotation_is_a_block_diagonal_product_and_undoes_itself():
    x = torch.randn(32, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.block_diag(*[reference.hadamard_matrix(32)] * 3)
    torch.testing.assert_close(reference.rotate(x, 32), x @ matrix)
    torch.testing.assert_close(reference.rotate(reference.rotate(x, 32), 32), x)
    torch.testing.assert_close(
        reference.rotate(x, 16, axis=0), torch.block_diag(*[reference.hadamard_matrix(16)] * 2) @ x
    )


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
@pytest.mark.parametrize("axis", [-1, 0])
def test_kernel_matches_the_reference(case, axis):
    kernel = pytest.importorskip("lowprec_kernels.hadamard.triton_kernel")
    rows = -(-case.rows // case.block) * case.block
    x = torch.randn(rows, case.dim, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    exact = reference.rotate(x.double(), case.block, axis)
    assert sqnr_db(exact, kernel.rotate(x, case.block, axis)) > cases.NOISE_FLOOR_DB
    assert sqnr_db(exact, kernel.rotate(x.float(), case.block, axis)) > 120


def test_kernel_keeps_nan_in_its_block():
    kernel = pytest.importorskip("lowprec_kernels.hadamard.triton_kernel")
    x = torch.ones(4, 64, device=DEVICE)
    x[1, 3] = torch.nan
    assert kernel.rotate(x, 32).isnan().nonzero().tolist() == [[1, i] for i in range(32)]
