"""The layers on a GPU: against the references on the CPU, without a host sync, and replayed as a CUDA graph."""

import copy

import pytest
import torch
from torch import nn

from lowprec.layers.eight_bit_schemes import Fp8, Fp8Hadamard, Int8Hadamard
from lowprec.optim import AdamW
from lowprec.testing import sqnr_db

pytestmark = pytest.mark.gpu
SCHEMES = (Fp8, Fp8Hadamard, Int8Hadamard)


def pair(frozen: bool, scheme, **fields) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Linear(384, 256, bias=True).bfloat16().requires_grad_(not frozen)
    return (
        scheme(**fields).convert(copy.deepcopy(plain).cuda(), frozen),
        scheme(**fields).convert(plain, frozen),
    )


def step(layer: nn.Module, x: torch.Tensor, error: torch.Tensor) -> list[torch.Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], error)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("frozen,layout", [(False, "one"), (True, "one"), (True, "both")])
@pytest.mark.parametrize("tokens", [1, 100, 1000])
def test_same_numbers_as_the_references(scheme, frozen, layout, tokens):
    gpu, cpu = pair(frozen, scheme, layout=layout)
    x, error = torch.randn(tokens, 384).bfloat16(), torch.randn(tokens, 256).bfloat16()
    found = step(gpu, x.cuda().requires_grad_(), error.cuda())
    for a, b in zip(step(cpu, x.requires_grad_(), error), found, strict=True):
        assert sqnr_db(a, b) > (35 if scheme.dtype == torch.int8 else 30)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("frozen", [False, True])
def test_no_host_sync_and_the_same_from_a_cuda_graph(scheme, frozen):
    layer, _ = pair(frozen, scheme)
    x = torch.randn(512, 384, device="cuda").bfloat16().requires_grad_()
    error = torch.randn(512, 256, device="cuda").bfloat16()
    # Detached: a graph kept from here would tie the leaves to this stream, which a capture may not depend on.
    expected = [t.detach().clone() for t in step(layer, x, error)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(layer, x, error)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(layer, x, error)
    with torch.no_grad():
        x.mul_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_by_inductor(scheme):
    torch._dynamo.reset()
    layer, _ = pair(False, scheme)
    x = torch.randn(512, 384, device="cuda").bfloat16().requires_grad_()
    error = torch.randn(512, 256, device="cuda").bfloat16()
    expected = step(layer, x, error)
    y = torch.compile(layer, fullgraph=True)(x)
    found = [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], error)]
    assert all(sqnr_db(a, b) > 45 for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_in_other_dtypes(scheme, frozen, dtype, autocast):
    torch.manual_seed(0)
    plain = nn.Linear(512, 256).to(dtype).cuda().requires_grad_(not frozen)
    layer = scheme().convert(copy.deepcopy(plain), frozen)
    x = torch.randn(100, 512, device="cuda", dtype=dtype).requires_grad_()
    error = torch.randn(100, 256, device="cuda")
    expected = step(plain.float(), x.detach().float().requires_grad_(), error)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    found = [y, *torch.autograd.grad(y, [x, *trained], error.to(y.dtype))]
    assert y.dtype == (torch.bfloat16 if autocast else dtype) and all(g.dtype == dtype for g in found[1:])
    assert all(sqnr_db(a, b.float()) > 26 for a, b in zip(expected, found, strict=True))


def test_cached_codes_follow_our_own_optimizer():
    """Its fused kernel writes by raw pointers."""
    layer = Fp8(cache="both").convert(nn.Linear(384, 256).bfloat16().cuda(), False)
    optimizer = AdamW(layer.parameters(), lr=0.1, master="split")
    x = torch.randn(64, 384, device="cuda").bfloat16()
    version = layer.weight._version
    for _ in range(2):
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    assert layer.weight._version > version
    fresh = Fp8().convert(nn.Linear(384, 256).bfloat16().cuda(), False)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))
