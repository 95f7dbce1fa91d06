"""A gated MLP of trained fp8 layers computed together, against its layers one by one: bits, memory, who refuses."""

import copy

import pytest
import torch
from lowprec_kernels.gated_rows import reference
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowprec.layers import eight_bit_linear
from lowprec.layers.eight_bit_schemes import Fp8, Fp8Hadamard, Int8Hadamard
from lowprec.layers.gated_mlp import gated_mlp, takes, why_not
from lowprec.layers.products import Product, WeightGradient
from lowprec.testing import sqnr_db

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN, INNER, TOKENS = 64, 160, 75
CPU_ALONE = pytest.mark.skipif(DEVICE == "cuda", reason="the kernels' sigmoid is not PyTorch's")


class Composed(torch.autograd.Function):
    """The definition in the place of Liger's kernel."""

    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return reference.product(gate, up, kind)

    @staticmethod
    def backward(ctx, error):
        return *reference.gradients(error, *ctx.saved_tensors, ctx.kind), None


class MLP(nn.Module):
    def __init__(self, scheme=None, kind="SwiGLU", together=True, bias=False, dtype=torch.bfloat16, dims=(IN, INNER)):
        super().__init__()
        torch.manual_seed(0)
        outer, inner = dims
        self.gate, self.up = (nn.Linear(outer, inner, bias=False).to(dtype) for _ in range(2))
        self.down = nn.Linear(inner, outer, bias=bias).to(dtype)
        scheme = scheme or Fp8()
        for name in ("gate", "up", "down"):
            setattr(self, name, scheme.convert(getattr(self, name), False))
        self.kind, self.together = kind, together

    def forward(self, x):
        if self.together:
            assert takes(self.gate, self.up, self.down)
            return gated_mlp(x, self.gate, self.up, self.down, self.kind)
        return self.down(Composed.apply(self.gate(x), self.up(x), self.kind))


def batch(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, IN, generator=generator).to(dtype).to(DEVICE) for _ in range(2))


def results(mlp: nn.Module, x: torch.Tensor, error: torch.Tensor) -> list[torch.Tensor]:
    """Output, input gradient, and the gradients of the parameters."""
    x = x.detach().clone().requires_grad_()
    y = mlp.to(DEVICE)(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *mlp.parameters()], error.to(y.dtype))]


def both(x, error, **options) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return results(MLP(**options), x, error), results(MLP(**options, together=False), x, error)


def same(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@CPU_ALONE
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("cache", ["none", "one", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_together_the_layers_give_the_bits_that_they_give_one_by_one(kind, cache, dtype):
    for shape in ((3, TOKENS // 3), (1,), (0,)):
        x, error = batch(*shape, dtype=dtype)
        assert same(*both(x, error, kind=kind, scheme=Fp8(cache=cache), bias=True, dtype=dtype))


@CPU_ALONE
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("inputs", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_computes_in_its_dtype_and_sums_in_that_of_the_input(weights, inputs):
    x, error = batch(TOKENS, dtype=inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = both(x, error, dtype=weights)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == inputs and found[2].dtype == weights
    assert same(found, expected)


@pytest.mark.parametrize("kind", reference.KINDS)
def test_noise_is_that_of_one_by_one(kind):
    x, error = batch(TOKENS)
    plain = MLP(kind=kind, together=False).float()
    wide = {name: nn.Linear(*getattr(plain, name).weight.shape[::-1], bias=False) for name in ("gate", "up", "down")}
    for name, layer in wide.items():
        layer.weight = getattr(plain, name).weight
        setattr(plain, name, layer)
    expected = results(plain, x.float(), error.float())
    assert all(sqnr_db(a, b.float()) > 22 for a, b in zip(expected, both(x, error, kind=kind)[0], strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant):
    mlp, (x, error) = MLP().to(DEVICE), batch(TOKENS)
    expected = results(mlp, x, error)
    x.requires_grad_()
    checkpoint(mlp, x, use_reentrant=reentrant).backward(error)
    assert same([x.grad, *(p.grad for p in mlp.parameters())], expected[1:])


def test_backward_may_be_repeated():
    mlp, (x, error) = MLP().to(DEVICE), batch(TOKENS)
    y = mlp(x.requires_grad_())
    first, second = (torch.autograd.grad(y, [x, *mlp.parameters()], error, retain_graph=True) for _ in range(2))
    assert same(first, second)


def test_what_is_kept_for_backward():
    """Gate and up in 16 bits, once; the codes of X, of H and of the weights."""
    mlp, (x, _) = MLP().to(DEVICE), batch(TOKENS)
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        mlp(x.requires_grad_())
    large = sorted((t.nbytes, t.itemsize) for t in saved.values() if t.numel() >= TOKENS * IN)
    inner, weight = TOKENS * INNER, IN * INNER
    assert large == sorted([(TOKENS * IN, 1), (inner, 1), (2 * inner, 2), (2 * inner, 2), *[(weight, 1)] * 3])


def test_the_last_weight_s_gradient_is_used_up_before_the_others_are_there():
    mlp, (x, error) = MLP().to(DEVICE), batch(TOKENS)
    seen = []
    for name, parameter in mlp.named_parameters():

        def hook(parameter, name=name):
            seen.append((name, [n for n, p in mlp.named_parameters() if p.grad is not None]))
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(hook)
    mlp(x).backward(error)
    assert seen[0] == ("down.weight", ["down.weight"]) and {name for name, _ in seen[1:]} == {
        "gate.weight", "up.weight"
    }  # fmt: skip


@pytest.mark.parametrize("frozen", ["gate", "up", "down", "all"])
def test_frozen_weights_get_no_gradient_and_their_layers_say_what_they_cost(frozen):
    mlp, (x, error) = MLP().to(DEVICE), batch(TOKENS)
    for name in ("gate", "up", "down"):
        getattr(mlp, name).requires_grad_(frozen not in (name, "all"))
    with pytest.warns(UserWarning, match="has a frozen weight now"):
        y = mlp(x.requires_grad_())
    y.backward(error)
    assert x.grad.isfinite().all()
    assert all((p.grad is not None) is p.requires_grad for p in mlp.parameters())
    with torch.no_grad():
        mlp(x)


@pytest.mark.parametrize("cache,expected", [("one", 3), ("none", 9)])
def test_weights_are_quantised_as_often_as_layer_by_layer(cache, expected, monkeypatch):
    made = []
    plain = eight_bit_linear.weight_codes
    monkeypatch.setattr(eight_bit_linear, "weight_codes", lambda *args: made.append(1) or plain(*args))
    mlp, (x, error) = MLP(scheme=Fp8(cache=cache)).to(DEVICE), batch(TOKENS)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    for _ in range(3):
        mlp(x).backward(error)
    assert len(made) == expected
    optimizer.step()
    fresh = MLP().to(DEVICE)
    fresh.load_state_dict(mlp.state_dict())
    assert torch.equal(mlp(x), fresh(x)) and len(made) > expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_gives_nan_out(bad):
    mlp, (x, error) = MLP(dtype=torch.float32), batch(TOKENS, dtype=torch.float32)
    broken = x.clone()
    broken[7, 3] = bad
    y, _, *grads = results(mlp, broken, error)
    assert not y[7].isfinite().any() and y[:7].isfinite().all()
    assert not any(grad.isfinite().all() for grad in grads)
    broken = error.clone()
    broken[7, 3] = bad
    _, grad, *grads = results(mlp, x, broken)
    assert not grad[7].isfinite().any() and grad[8:].isfinite().all()
    assert not any(grad.isfinite().all() for grad in grads)


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a tensor's value was read by the host"
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_by_the_host():
    mlp, (x, error) = MLP().to(DEVICE), batch(TOKENS)
    with NoHostReads():
        mlp(x.requires_grad_()).backward(error)


@CPU_ALONE
def test_ddp_averages_its_gradients(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        x, error = batch(TOKENS)
        expected = results(MLP(), x, error)
        mlp = MLP()
        nn.parallel.DistributedDataParallel(mlp)(x).backward(error)
        assert same([p.grad for p in mlp.parameters()], expected[2:])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "scheme",
    [
        Fp8Hadamard(),
        Int8Hadamard(),
        Fp8(preset="halo0"),
        Fp8(forward=Product(rotate="in")),
        Fp8(input_gradient=Product(scale="tensor")),
        Fp8(input_gradient=Product(rotate="tokens")),
        Fp8(weight_gradient=WeightGradient(rotate="tokens")),
        Fp8(weight_gradient=WeightGradient(precision="bf16")),
    ],
    ids=str,
)
def test_other_products_are_refused(scheme):
    mlp, other = MLP(), MLP(scheme=scheme, together=False)
    assert why_not(mlp.gate, mlp.up, mlp.down) is None
    assert "products of its down layer" in why_not(mlp.gate, mlp.up, other.down)
    assert "products of its gate layer" in why_not(other.gate, mlp.up, mlp.down)


def test_other_layers_are_refused():
    mlp = MLP()
    with torch.no_grad():
        plain, biased = nn.Linear(IN, INNER), Fp8().convert(nn.Linear(IN, INNER), False)
    assert why_not(plain, mlp.up, mlp.down) == "its gate layer is a Linear"
    frozen = Fp8().convert(nn.Linear(IN, INNER), True)
    assert why_not(mlp.gate, frozen, mlp.down) == "its up layer is a FrozenEightBitLinear"
    assert "bias" in why_not(biased, mlp.up, mlp.down)
    assert why_not(mlp.gate, mlp.up, Fp8().convert(nn.Linear(INNER, IN), False)) is None


def test_who_looks_at_a_layer_sees_it_called():
    mlp = MLP()
    layers = mlp.gate, mlp.up, mlp.down
    assert takes(*layers)
    hook = mlp.up.register_forward_hook(lambda *args: None)
    assert not takes(*layers)
    hook.remove()
    assert takes(*layers) and takes(*copy.deepcopy(mlp).eval().children())
    mlp.down.forward = lambda x: x
    assert not takes(*layers)
    with torch.no_grad():
        assert not takes(*MLP().eval().children()) and takes(*MLP().children())
