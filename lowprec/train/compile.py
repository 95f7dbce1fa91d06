"""``torch.compile`` of the decoder layers, each by itself: they are alike, so one is compiled for all."""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lowprec.errors import UserError


def compile_layers(model: nn.Module, backend: str = "inductor") -> int:
    """Let the decoder layers of this one model be compiled when they first run.

    Args:
        model: of transformers, bare or with adapters.
        backend: of ``torch.compile``.

    Returns:
        How many layers that are.

    Raises:
        UserError: the architecture has no such layers.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"train.torch_compile=true: {type(model).__name__} has no layers of transformers' own kind.")
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)


def compile_seconds() -> float:
    """Seconds that this process has spent in compiling: its first steps were longer by them."""
    from torch._dynamo.utils import calculate_time_spent

    return round(calculate_time_spent().get("total_wall_time", 0.0), 2)
