"""Every op: the fake agrees with the real one, a backend that cannot run says why, and the kernels agree on a GPU."""

import subprocess
import sys

import pytest
import torch
from lowprec_kernels.quantize_rows import cases as cast_cases
from lowprec_kernels.quantize_rows.reference import FP8, dequantize
from lowprec_kernels.scaled_grouped_matmul import cases as group_cases
from lowprec_kernels.scaled_matmul import cases as product_cases
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowprec import ops
from lowprec.errors import UserError
from lowprec.testing import sqnr_db

MODULES = {
    name: sys.modules[f"lowprec.ops.{name}"]
    for name in (
        "fold_scales",
        "gather_host_rows",
        "quantize_columns",
        "quantize_gated",
        "quantize_rows",
        "rotate",
        "scaled_grouped_matmul",
        "scaled_matmul",
        "transpose_codes",
    )
}


def grouped(case: group_cases.Case, device: str, transposed: bool):
    """Operands of a grouped product; the second as it is stored, or a view of all groups transposed at once."""
    generator = torch.Generator().manual_seed(0)
    groups, rows = len(case.sizes), sum(case.sizes)
    a, scale_a = ops.quantize_rows(torch.randn(rows, case.k, generator=generator).to(device), 1, FP8)
    width = case.n if transposed else case.k
    b, _ = ops.quantize_rows(torch.randn(groups * case.n * case.k // width, width, generator=generator), 1, FP8)
    b = b.to(device)
    b = ops.transpose_codes(b).view(case.n, groups, case.k).transpose(0, 1) if transposed else b.view(groups, -1, width)
    scale_b = torch.rand(groups, case.n, generator=generator).to(device)
    ends = torch.tensor(case.sizes).cumsum(0).to(device, torch.int32)
    return a, scale_a, b, scale_b, ends, torch.bfloat16, True


def calls(device: str = "cpu"):
    """Each op with arguments."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in (FP8, torch.int8):
        codes, scale = ops.quantize_rows(x, 1, dtype)
        yield ops.quantize_rows, (x, 16, dtype)
        yield ops.quantize_rows, (x, 1, dtype, True, scale)
        yield ops.quantize_columns, (x, 32, dtype)
        yield ops.quantize_columns, (x, 1, dtype)
        yield ops.requantize_columns, (codes, scale, 16, 32, torch.ones(64, device=device))
        yield ops.transpose_codes, (codes,)
        yield ops.scaled_matmul, (codes, scale, codes, scale, None, torch.bfloat16)
        yield ops.scaled_matmul, (codes, scale, codes, scale, scale, torch.float32, True)
        low = (x[:, :8].bfloat16(), x[:, 8:16])
        yield ops.scaled_matmul, (codes, scale, codes, scale, None, torch.bfloat16, True, *low)
    for kind in ("SwiGLU", "GeGLU"):
        yield ops.quantize_gated, (x, x.flip(0), kind)
        yield ops.quantize_gated_gradients, (x, x.flip(0), x.flip(1), kind, torch.rand(40, device=device))
    yield ops.transpose_codes, (ops.quantize_rows(x, 1, FP8)[0], torch.ones(40, device=device))
    yield ops.scaled_grouped_matmul, grouped(group_cases.SMALL[2], device, True)
    yield ops.fold_scales, (torch.rand(40, device=device),)
    yield ops.fold_scales, (torch.rand(40, device=device), torch.rand(40, device=device), 64)
    yield ops.gather_host_rows, (torch.arange(6, device=device).view(2, 3), x)
    yield ops.rotate, (x, 16)
    yield ops.rotate, (x, 8, 0)


@pytest.mark.parametrize("op,arguments", calls(), ids=lambda value: getattr(value, "__name__", None))
def test_fake_has_the_shapes_and_dtypes_of_the_real_op(op, arguments):
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (real, fake)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def test_rotation_has_its_transpose_as_gradient():
    x = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.rotate(t, 16), (x,))
    x = torch.randn(32, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.rotate(t, 16, 0), (x,))


def test_backends_say_why_they_cannot_run():
    codes, scale = ops.quantize_rows(torch.randn(16, 16), 1, torch.int8)
    reasons = [
        b.why_not(codes, scale, codes, scale, None, torch.bfloat16, True) for b in MODULES["scaled_matmul"].BACKENDS
    ]
    assert reasons[-1] is None and all(reasons[:-1]) and "CUDA" in reasons[0] and "fp8 only" in reasons[1]
    assert "block of 512" in MODULES["quantize_rows"].BACKENDS[0].why_not(torch.randn(2, 512), 512, FP8, False, None)
    for module in MODULES.values():
        assert module.BACKENDS[-1].name == "reference"


def test_who_watches_sees_the_op_and_nobody_else_pays_for_it():
    x = torch.randn(16, 16)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            seen.append(str(operation))
            return operation(*args, **(kwargs or {}))

    with torch.no_grad():
        with Watch():
            watched = ops.quantize_rows(x, 16, FP8)
        assert seen[0] == "lowprec.quantize_rows.default"
        with torch.profiler.profile() as profile:
            alone = ops.quantize_rows(x, 16, FP8)
    assert not any(event.name == "lowprec::quantize_rows" for event in profile.events())
    assert all(torch.equal(a, b) for a, b in zip(watched, alone, strict=True))


def test_importing_loads_no_kernel():
    code = "import sys, lowprec.ops; assert not [m for m in sys.modules if m.endswith('triton_kernel')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cast_cases.SMALL, ids=str)
@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
def test_casts_on_the_gpu(case, dtype):
    x = torch.randn(case.rows, case.dim, device="cuda").bfloat16()
    found, expected = ops.quantize_rows(x, case.block, dtype), ops.quantize_rows(x.cpu(), case.block, dtype)
    exact = ops.rotate(x.double().cpu(), case.block) if case.block > 1 else x.double().cpu()
    fast = sqnr_db(exact, dequantize(found[0].cpu(), found[1].cpu()))
    assert fast > sqnr_db(exact, dequantize(*expected)) - 3


@pytest.mark.parametrize("rank", [8, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_term_of_low_rank_is_added_by_whatever_runs(rank, dtype, device):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(device)
    low = torch.randn(40, 2 * rank, generator=torch.Generator().manual_seed(1)).to(device, dtype)[:, rank:]
    up = torch.randn(48, rank, generator=torch.Generator().manual_seed(2)).to(device)
    for codes in (FP8, torch.int8):
        a, b = ops.quantize_rows(x, 1, codes), ops.quantize_rows(x.repeat(2, 1)[:48], 1, codes)
        exact = dequantize(a[0], a[1].double()) @ dequantize(b[0], b[1].double()).t()
        exact += low.double() @ up.to(dtype).double().t()
        for fast in (True, False):
            assert sqnr_db(exact, ops.scaled_matmul(*a, *b, None, dtype, fast, low, up)) > 45


@pytest.mark.gpu
@pytest.mark.parametrize("case", product_cases.SMALL, ids=str)
@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("fast", [False, True])
def test_products_on_the_gpu(case, dtype, fast):
    a = ops.quantize_rows(torch.randn(case.m, case.k, device="cuda"), 1, dtype)
    b = ops.quantize_rows(torch.randn(case.n, case.k, device="cuda"), 1, dtype)
    exact = dequantize(a[0], a[1].double()) @ dequantize(b[0], b[1].double()).t()
    ran = 0
    for backend in MODULES["scaled_matmul"].BACKENDS:
        arguments = (*a, *b, None, torch.bfloat16, fast)
        if backend.why_not(*arguments) is None:
            assert sqnr_db(exact, backend.run(*arguments)) > 45, backend.name
            ran += 1
    assert ran >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", [*group_cases.SMALL, group_cases.LAYER], ids=str)
def test_grouped_products_on_the_gpu(case, transposed):
    """Sizes of groups are no multiple of anything, and some groups are empty."""
    a, scale_a, b, scale_b, ends, *rest = grouped(case, "cuda", transposed)
    backend = MODULES["scaled_grouped_matmul"].BACKENDS[0]
    if reason := backend.why_not(a, scale_a, b, scale_b, ends, *rest):
        pytest.skip(reason)
    operands = (a.cpu(), scale_a.double().cpu(), b.cpu(), scale_b.double().cpu(), ends.cpu())
    exact = MODULES["scaled_grouped_matmul"].BACKENDS[-1].run(*operands, torch.float64)
    for fast in (True, False):
        found = backend.run(a, scale_a, b, scale_b, ends, torch.bfloat16, fast)
        assert sqnr_db(exact, found.cpu()) > (38 if fast else 45)


def test_groups_are_not_multiplied_by_the_reference_on_a_gpu_without_the_product(monkeypatch):
    """A converted model was moved there: nothing would tell why it is slow."""
    module = MODULES["scaled_grouped_matmul"]
    monkeypatch.setattr(module, "no_grouped_product", lambda device: f"{device} lacks it")
    codes, *rest = grouped(group_cases.SMALL[2], "cpu", False)
    with FakeTensorMode():
        on_gpu = torch.empty(codes.shape, dtype=FP8, device="cuda")
    with pytest.raises(UserError, match="cannot be multiplied on cuda:0: cuda:0 lacks it.* wrap.rules"):
        module._run(on_gpu, *rest)
