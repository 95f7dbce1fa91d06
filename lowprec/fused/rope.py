"""Rotary embeddings by Liger's kernel, through the attention's own code.

Transformers' attentions call ``apply_rotary_pos_emb`` by its name in their file. Exchanging it there would change every
model of the process. Instead the instance gets a ``forward`` of the same code, for which this one name stands for the
kernel.
"""

import inspect
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lowprec.fused.liger import runs_on
from lowprec.fused.stand_in import replace_forward

NAME = "apply_rotary_pos_emb"


def plain_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: q, k ``[batch, heads, tokens, dim]``, cos, sin ``[batch, tokens, dim]``; halves are turned
    against each other."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(unsqueeze_dim) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(unsqueeze_dim)

    return turn(q), turn(k)


def calls_rope(kind: Any) -> bool:
    """Whether the class's ``forward`` calls a function of that name."""
    return _code(kind) is not None


def recognise(module: nn.Module) -> bool:
    """Whether the function of that name, in the module's file, is the one that the kernel computes."""
    kind: Any = type(module)
    code = _code(kind)
    return code is not None and _is_plain(code.__globals__.get(NAME))


def put_kernel(module: nn.Module, _: bool = True) -> None:
    """Let this one attention turn queries and keys by Liger's kernel wherever it can run."""
    kind: Any = type(module)
    replace_forward(module, _with_kernel(kind, _owns_its_queries(module)))


@cache
def _code(kind: Any) -> FunctionType | None:
    forward = inspect.unwrap(kind.forward)
    if isinstance(forward, FunctionType) and NAME in forward.__code__.co_names:
        return forward
    return None


@cache
def _is_plain(function: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator, device="cpu") for heads in (4, 2))
    angles = torch.randn(2, 3, 4, generator=generator, device="cpu").repeat(1, 1, 2)
    try:
        found = function(q.clone(), k.clone(), angles.cos(), angles.sin())
    except Exception:  # a function of the same name for something else
        return False
    expected = plain_rope(q, k, angles.cos(), angles.sin())
    return len(found) == 2 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def _owns_its_queries(module: nn.Module) -> bool:
    """Whether queries and keys are products of their own, so that nobody minds their being turned in place."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj"))


@cache
def _with_kernel(kind: Any, in_place: bool) -> FunctionType:
    from liger_kernel.ops import LigerRopeFunction

    plain = _code(kind)
    assert plain is not None
    own = plain.__globals__[NAME]

    def rope(q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **named: Any) -> Any:
        # Dynamo cannot look into Liger's function, and fuses the plain one itself.
        if rest or named or not runs_on(q) or cos.shape[-1] != q.shape[-1] or torch.compiler.is_compiling():
            return own(q, k, cos, sin, *rest, **named)
        if not in_place:
            q, k = q.clone(), k.clone()
        return LigerRopeFunction.apply(q, k, cos, sin)

    names = plain.__globals__ | {NAME: rope}
    del names["__name__"]  # torch.compile would read the names from the module so called, and find the plain function
    forward = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__ = plain.__kwdefaults__
    return forward
