"""The three 8-bit products against fp32: noise, what is saved, odd inputs, compile, checkpointing, autocast, DDP."""

import copy
import itertools

import pytest
import torch
from lowprec_kernels.quantize_rows.reference import FP8
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowprec.layers.eight_bit_schemes import EightBit, Fp8, Fp8Hadamard, Int8Hadamard
from lowprec.layers.products import ROTATIONS, Product, WeightGradient
from lowprec.testing import sqnr_db

SCHEMES = (Fp8, Fp8Hadamard, Int8Hadamard)
FLOOR_DB = {FP8: 27.0, torch.int8: 35.0}
OUT, IN, TOKENS = 96, 192, 75


def linear(bias: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(IN, OUT, bias=bias).to(dtype)


def results(layer: nn.Module, x: torch.Tensor, error: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient, and the gradients of the parameters that have one."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], error)]


def batch(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(*shape, IN, generator=generator).to(dtype),
        torch.randn(*shape, OUT, generator=generator).to(dtype),
    )


def noise(scheme: EightBit, frozen: bool = False) -> list[float]:
    plain = linear()
    x, error = batch(3, TOKENS // 3)
    wide = copy.deepcopy(plain).float().requires_grad_(not frozen)
    expected = results(wide, x.float(), error.float())
    converted = scheme.convert(plain.requires_grad_(not frozen), frozen)
    return [sqnr_db(a, b.float()) for a, b in zip(expected, results(converted, x, error), strict=True)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cache", ["none", "one", "both"])
def test_trained_layer(scheme, cache):
    assert min(noise(scheme(cache=cache))) > FLOOR_DB[scheme.dtype]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", ["one", "both"])
def test_frozen_layer(scheme, layout):
    assert min(noise(scheme(layout=layout), frozen=True)) > FLOOR_DB[scheme.dtype]


@pytest.mark.parametrize("scheme", [Fp8, Int8Hadamard])
@pytest.mark.parametrize("preset", ["halo0", "halo1", "halo2"])
def test_halo_presets(scheme, preset):
    assert min(noise(scheme(preset=preset))) > 26


@pytest.mark.parametrize("scheme", [Fp8, Int8Hadamard])
def test_every_combination_of_rotations_and_scales(scheme):
    for forward, error, weight in itertools.product(*ROTATIONS.values()):
        for scale in ("row", "tensor"):
            made = scheme(
                forward=Product(rotate=forward, scale=scale),
                input_gradient=Product(rotate=error, scale=scale),
                weight_gradient=WeightGradient(rotate=weight, scale=scale),
            )
            assert min(noise(made)) > 26, made
    assert noise(scheme(weight_gradient=WeightGradient(precision="bf16")))[2] > 45


def test_rotation_rescues_int8_from_outliers():
    plain = linear(bias=False, dtype=torch.float32)
    x, error = batch(64, dtype=torch.float32)
    x[:, 5] *= 200
    expected = plain(x)
    bare = Int8Hadamard(forward=Product(), input_gradient=Product(), weight_gradient=WeightGradient())
    x_rest = sqnr_db(expected, Int8Hadamard().convert(copy.deepcopy(plain), False)(x))
    assert x_rest > sqnr_db(expected, bare.convert(copy.deepcopy(plain), False)(x)) - 1
    # seen by the other inputs alone, whose share of the output the outlier's step drowns
    clean = x.clone()
    clean[:, 5] = 0
    base, outlier = plain(clean), expected - plain(clean)
    found = [s.convert(copy.deepcopy(plain), False)(x) - outlier for s in (Int8Hadamard(), bare)]
    assert sqnr_db(base, found[0]) > sqnr_db(base, found[1]) + 6


@pytest.mark.parametrize("frozen,layout", [(False, "one"), (True, "one"), (True, "both")])
def test_wide_layers_are_rotated_in_larger_blocks_against_an_outlier(frozen, layout):
    torch.manual_seed(0)
    plain = nn.Linear(512, 64, bias=False)
    x, error = torch.randn(64, 512), torch.randn(64, 64)
    x[:, 5] += 60
    expected = results(copy.deepcopy(plain).requires_grad_(not frozen), x, error)
    layers = [
        scheme.convert(copy.deepcopy(plain).requires_grad_(not frozen), frozen)
        for scheme in (Int8Hadamard(layout=layout), Int8Hadamard(layout=layout, wide_block=64))
    ]
    assert [layer.rotation_block for layer in layers] == [256, 64]
    assert Int8Hadamard().plan(64, 512).in_block == 64 and Fp8Hadamard().plan(512, 64).in_block == 64
    wide, narrow = (results(layer, x, error) for layer in layers)
    assert sqnr_db(expected[0], wide[0]) > sqnr_db(expected[0], narrow[0]) + 1
    assert all(sqnr_db(a, b) > FLOOR_DB[torch.int8] for a, b in zip(expected[1:], wide[1:], strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_for_backward_is_8_bit(scheme):
    x, error = batch(TOKENS)
    x.requires_grad_()
    for frozen in (False, True):
        layer = scheme().convert(linear().requires_grad_(not frozen), frozen)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            layer(x)
        large = [t for t in saved if t.numel() >= min(TOKENS * IN, OUT * IN)]
        mine = layer._parameters["weight"]
        assert all(t.itemsize == 1 or t.data_ptr() == mine.data_ptr() for t in large)
        if frozen:
            assert not any(t.numel() >= TOKENS * 16 and t.data_ptr() != mine.data_ptr() for t in saved)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("frozen", [False, True])
def test_shapes_of_the_input(scheme, frozen):
    layer = scheme().convert(linear(dtype=torch.float32).requires_grad_(not frozen), frozen)
    for shape in ((1,), (2, 3, 5), (0,), (17,)):
        x, error = batch(*shape, dtype=torch.float32)
        y, grad, *rest = results(layer, x, error)
        assert y.shape == (*shape, OUT) and grad.shape == x.shape and all(r.isfinite().all() for r in (y, grad, *rest))
    x, error = batch(16, dtype=torch.float32)
    strided = torch.cat([x, x], 1)[:, :IN]
    expected = results(layer, x, error)
    found = results(layer, strided, error.t().contiguous().t())
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_rows_learn_and_extremes_stay_finite(scheme):
    plain = linear(bias=False, dtype=torch.float32)
    with torch.no_grad():
        plain.weight[:16] = 0
    x, error = batch(TOKENS, dtype=torch.float32)
    x[3], error[5] = 0, 0
    expected = results(copy.deepcopy(plain), x, error)
    layer = scheme().convert(plain, False)
    found = results(layer, x, error)
    assert sqnr_db(expected[2][:16], found[2][:16]) > FLOOR_DB[scheme.dtype] - 3
    assert not found[0][:, :16].any() and not found[0][3].any()
    for factor in (1e30, 1e-30, 1e-42):
        assert all(r.isfinite().all() for r in results(layer, x * factor, error * 1e-8)[:2])
    assert all(r.isfinite().all() for r in results(layer, torch.full_like(x, 3.0), torch.ones_like(error)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_gives_nan_out(scheme, frozen, bad):
    layer = scheme().convert(linear(dtype=torch.float32).requires_grad_(not frozen), frozen)
    x, error = batch(TOKENS, dtype=torch.float32)
    broken = x.clone()
    broken[7, 3] = bad
    y, _, *rest = results(layer, broken, error)
    assert not y[7].isfinite().any() and y[:7].isfinite().all()
    assert not rest or not rest[0].isfinite().all()
    broken = error.clone()
    broken[7, 3] = bad
    _, grad, *rest = results(layer, x, broken)
    assert not grad[7].isfinite().any() and grad[8:].isfinite().all()
    assert not rest or not rest[0].isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(scheme, frozen, reentrant):
    layer = scheme().convert(linear().requires_grad_(not frozen), frozen)
    x, error = batch(TOKENS)
    expected = results(layer, x, error)
    x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(error)
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_without_a_graph_break(scheme, frozen):
    torch._dynamo.reset()
    layer = scheme().convert(linear().requires_grad_(not frozen), frozen)
    x, error = batch(TOKENS)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = results(layer, x, error)
    x = x.clone().requires_grad_()
    y = compiled(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    found = [y.detach(), *torch.autograd.grad(y, [x, *trained], error)]
    assert all(sqnr_db(a, b) > 50 for a, b in zip(expected, found, strict=True))


def test_autocast_computes_in_its_dtype():
    layer = Fp8().convert(linear(dtype=torch.float32), False)
    x, _ = batch(TOKENS, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a tensor's value was read by the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", [*(s() for s in SCHEMES), Fp8(preset="halo2"), Int8Hadamard(cache="both")], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_no_value_is_read_by_the_host(scheme, frozen):
    layer = scheme.convert(linear().requires_grad_(not frozen), frozen)
    x, error = batch(TOKENS)
    with _NoHostReads():
        x = x.requires_grad_()
        layer(x).backward(error)
    with pytest.raises(AssertionError), _NoHostReads():
        x.detach().sum().item()


def test_ddp_averages_its_gradients(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        x, error = batch(TOKENS)
        expected = results(Fp8().convert(linear(), False), x, error)
        layer = Fp8().convert(linear(), False)
        parallel = nn.parallel.DistributedDataParallel(layer)
        parallel(x).backward(error)
        assert torch.equal(layer.weight.grad, expected[2]) and torch.equal(layer.bias.grad, expected[3])
    finally:
        dist.destroy_process_group()


def test_a_grown_dimension_is_refused_with_the_reason():
    assert "multiples of 16" in Fp8().why_not(nn.Linear(20, 16), False)
    assert "already" in Fp8().why_not(Fp8().convert(linear(), False), False)
    with torch.device("meta"):
        assert "meta" in Fp8().why_not(nn.Linear(32, 16), False)
