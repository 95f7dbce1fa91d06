"""Norm, gated product and rotary embedding, forward and backward, bf16: ours, Liger's and PyTorch's operations."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from lowprec.bench.step.call import Call, liger_functions
from lowprec.fused import mlp, norm
from lowprec.fused.rope import plain_rope

ROWS = ((4096, 4096), (8192, 2048))
"""Tokens and width: Llama-3-8B, Llama-3.2-1B."""
INNER_ROWS = ((4096, 14336), (8192, 8192))
"""Tokens and inner width of their MLPs."""
HEADS = ((4096, 32, 8, 128), (8192, 32, 8, 64))
"""Tokens, heads, key heads and their dimension."""

Ways = dict[str, Callable[[], torch.Tensor]]


def rmsnorm(tokens: int, width: int, device: torch.device) -> Iterator[Call]:
    function = liger_functions().LigerRMSNormFunction
    x, trained = _leaf(tokens, width, device=device), _leaf(width, device=device)
    variant = norm.Variant(0.0, "llama", 1e-6)
    for weight, leaves in ((trained, [x, trained]), (trained.detach(), [x])):
        ways: Ways = {
            "PyTorch": partial(norm.plain_norm, x, weight, variant),
            "Liger": partial(function.apply, x, weight, 1e-6, 0.0, "llama", False, None),
            "lowprec": partial(norm.RMSNorm.apply, x, weight, variant),
        }
        yield from _steps(f"{tokens} x {width}, weight {'trained' if leaves[1:] else 'frozen'}", ways, leaves)


def swiglu(tokens: int, inner: int, device: torch.device) -> Iterator[Call]:
    function = liger_functions().LigerSiLUMulFunction
    gate, up = (_leaf(tokens, inner, device=device) for _ in range(2))
    ways: Ways = {
        "PyTorch": lambda: mlp.PLAIN["SwiGLU"](gate, up),
        # Its backward overwrites what it was given.
        "Liger": lambda: function.apply(gate.clone(), up.clone()),
        "two clones, which Liger's row has besides": lambda: gate.clone() + up.clone(),
    }
    yield from _steps(f"{tokens} x {inner}", ways, [gate, up])


def rope(tokens: int, heads: int, key_heads: int, dim: int, device: torch.device) -> Iterator[Call]:
    function = liger_functions().LigerRopeFunction
    q, k = (
        _leaf(1, tokens, n, dim, device=device).detach().transpose(1, 2).requires_grad_() for n in (heads, key_heads)
    )
    angles = torch.randn(1, tokens, dim // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    ways: Ways = {
        "PyTorch": lambda: torch.cat(plain_rope(q, k, cos, sin), 1),
        "Liger": lambda: torch.cat(function.apply(q.clone(), k.clone(), cos, sin), 1),
    }
    yield from _steps(f"{tokens} x {heads} + {key_heads} heads of {dim}", ways, [q, k])


def _steps(shape: str, ways: Ways, leaves: list[torch.Tensor]) -> Iterator[Call]:
    def gradients(way: Callable[[], torch.Tensor], error: torch.Tensor) -> object:
        return torch.autograd.grad(way(), leaves, error)

    for name, way in ways.items():
        yield Call(shape, name, partial(gradients, way, torch.randn_like(way())))


def _leaf(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16).mul_(0.05).requires_grad_()
