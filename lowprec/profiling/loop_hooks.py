"""Phases of a loop that does not know of them, by hooks on its model and its optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter

from lowprec.profiling.phases import Phases


@contextmanager
def watch_loop(model: nn.Module | None, optimizer: torch.optim.Optimizer | None, phases: Phases) -> Iterator[None]:
    """Enter the phases while the loop runs: forward where the model is called; backward at the first gradient of its
    result; optimizer in its ``step``; other after it. A loss computed outside the model counts as ``forward``.
    """
    hooks: list[Any] = []

    def backward_begins(gradient: torch.Tensor) -> None:
        phases.enter("backward")

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        for value in _tensors(output):
            if value.requires_grad:
                value.register_hook(backward_begins)

    if model is not None:
        hooks.append(model.register_forward_pre_hook(lambda module, args: phases.enter("forward")))
        hooks.append(model.register_forward_hook(returned))
    if optimizer is not None:
        hooks.append(optimizer.register_step_pre_hook(lambda *_: phases.enter("optimizer")))
        hooks.append(optimizer.register_step_post_hook(lambda *_: phases.enter("other")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors in a module's output, which may be one of Hugging Face's ordered dictionaries."""
    values = output.values() if hasattr(output, "values") and not isinstance(output, torch.Tensor) else [output]
    return [value for value in tree_iter(list(values)) if isinstance(value, torch.Tensor)]
