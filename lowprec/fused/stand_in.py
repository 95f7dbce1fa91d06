"""Modules are recognised by what they compute, tried on small random numbers, and not by their names."""

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn


def stand_in(module: nn.Module, children: Mapping[str, nn.Module]) -> Any:
    """A shallow copy of ``module`` with some children exchanged; the module itself is left as it is."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules) | dict(children)
    twin.__dict__.pop("forward", None)  # the class's own
    return twin


def random_linear(out_features: int, in_features: int, generator: torch.Generator) -> nn.Linear:
    """A small fp32 layer on the CPU whose weights do not draw from the process's random state."""
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight = nn.Parameter(
        torch.randn(out_features, in_features, generator=generator, device="cpu"), requires_grad=False
    )
    return linear


def replace_forward(module: nn.Module, forward: Any) -> None:
    """Give this one instance another ``forward(self, ...)``. Copies of the module get it bound to themselves."""
    module.forward = MethodType(forward, module)


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody has given the instance a ``forward`` of its own."""
    return "forward" in vars(module)
