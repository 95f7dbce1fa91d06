"""Where a NaN or an infinity arose: a bad step is taken again from its own batch and random state, and watched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from lowprec.data import StepBatch
from lowprec.errors import UserError
from lowprec.train.state import set_random_state
from lowprec.train.step import loss_sum


class NonFiniteError(UserError):
    """The loss or a gradient became NaN or infinite."""


def find_origin(model: nn.Module, batch: StepBatch, random_state: dict[str, Any], accelerator: Accelerator) -> str:
    """The first layer, in the order of computing, whose result is not finite. Waits for the device at every layer.

    Every process calls this, each with its own part of the step, and gets the same answer.

    Args:
        model: with the weights that the step began with.
        batch: this process's part of the step.
        random_state: as it was before the step.

    Returns:
        Words such as ``forward of model.layers.3.mlp.down_proj``.
    """
    set_random_state(random_state)
    origin: list[str] = []
    with _watch(model, origin):
        for inputs in batch.micro_batches:
            with accelerator.autocast():
                loss = loss_sum(model, inputs)
            if not origin and not _finite(loss):
                origin.append("the loss")
            if not origin:
                (loss / max(batch.num_trained_tokens_global, 1)).backward()
            if origin:
                break
    if not origin:
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
        origin += [f"gradient of {bad[0]}"] if bad else []
    model.zero_grad(set_to_none=True)
    found = gather_object(origin)  # the bad sample may have been another process's
    return found[0] if found else "sum over the micro-batches and processes"


@contextmanager
def _watch(model: nn.Module, origin: list[str]) -> Iterator[None]:
    """Note the first non-finite result of a leaf module in forward, and the first non-finite gradient in backward."""
    hooks = []

    def forward(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            result = output[0] if isinstance(output, tuple) else output
            if isinstance(result, torch.Tensor) and not origin and not _finite(result):
                origin.append(f"forward of {name}")
            if isinstance(result, torch.Tensor) and result.requires_grad:
                result.register_hook(backward(name))

        return hook

    def backward(name: str) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            if not origin and not _finite(gradient):
                origin.append(f"gradient of the output of {name}")

        return hook

    for name, module in model.named_modules():
        if not list(module.children()) or hasattr(module, "place"):  # a fused LoRA layer does not call its parts
            hooks.append(module.register_forward_hook(forward(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _finite(tensor: torch.Tensor) -> bool:
    # Unseen by autograd and by the modes that count a layer's operations: a layer's pass and its recomputation have to
    # be alike, and the question is asked in one of them only.
    with _disable_current_modes():
        return bool(torch.isfinite(tensor.detach()).all()) if tensor.is_floating_point() else True
