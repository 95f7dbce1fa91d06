"""A gated MLP of trained fp8 layers on a GPU: beside its layers around Liger's kernel, without a host sync, and as a
CUDA graph."""

import pytest
import torch
from torch.nn import functional as F

from lowprec.testing import sqnr_db
from tests.layers.test_gated_mlp import MLP, results

pytestmark = pytest.mark.gpu
SHAPES = ((2048, 8192, 1024), (4096, 14336, 512), (96, 336, 33))
"""Outer and inner width, tokens: of Llama-3.2-1B and Llama-3-8B, and an odd one."""


class AroundLiger(MLP):
    """The layers one by one."""

    def forward(self, x):
        import liger_kernel.ops as ops

        function = {"SwiGLU": ops.LigerSiLUMulFunction, "GeGLU": ops.LigerGELUMulFunction}[self.kind]
        return self.down(function.apply(self.gate(x), self.up(x)))


def batch(outer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, error = (torch.randn(tokens, outer, generator=generator).bfloat16().cuda() for _ in range(2))
    return x, 1e-3 * error


@pytest.mark.parametrize("kind", ["SwiGLU", "GeGLU"])
@pytest.mark.parametrize("outer,inner,tokens", SHAPES)
def test_results_and_gradients_are_those_of_the_layers_around_liger_s_kernel(outer, inner, tokens, kind):
    pytest.importorskip("liger_kernel")
    x, error = batch(outer, tokens)
    options = {"kind": kind, "dims": (outer, inner), "bias": True}
    together, apart = results(MLP(**options), x, error), results(AroundLiger(**options), x, error)
    assert [torch.equal(a, b) for a, b in zip(together, apart, strict=True)] == [True] * len(apart)


@pytest.mark.parametrize("outer,inner,tokens", SHAPES)
def test_noise_against_fp32_products(outer, inner, tokens):
    x, error = batch(outer, tokens)
    mlp = MLP(dims=(outer, inner)).cuda()
    leaves = [t.detach().float().requires_grad_() for t in (x, mlp.gate.weight, mlp.up.weight, mlp.down.weight)]
    wide, gate, up, down = leaves
    y = F.linear(F.silu(F.linear(wide, gate)) * F.linear(wide, up), down)
    expected = [y, *torch.autograd.grad(y, leaves, error.float())]
    assert all(sqnr_db(a, b.float()) > 22 for a, b in zip(expected, results(mlp, x, error), strict=True))


@pytest.mark.parametrize("kind", ["SwiGLU", "GeGLU"])
def test_no_host_sync_and_the_same_from_a_cuda_graph(kind):
    mlp, (x, error) = MLP(kind=kind, dims=(512, 1024)).cuda(), batch(512, 256)
    x.requires_grad_()

    def step() -> list[torch.Tensor]:
        return [y := mlp(x), *torch.autograd.grad(y, [x, *mlp.parameters()], error)]

    # Detached: a graph kept from here would tie the leaves to this stream, which a capture may not depend on.
    expected = [t.detach().clone() for t in step()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with torch.no_grad():
        x.mul_(-0.5)
        mlp.up.weight.mul_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(step(), found, strict=True))
