"""The policies by name, and how one is put on a model.

Transformers' decoder layers ask two attributes of theirs: whether to checkpoint, and by which function. All policies
are such functions around PyTorch's checkpoint without re-entry, so none of them changes a bit of the results.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lowprec.activations.graphs import GraphedLayer, LayerGraphs
from lowprec.activations.offload import Offload
from lowprec.activations.selective import Selective
from lowprec.attention import head_dim, why_no_flash_of
from lowprec.errors import UserError
from lowprec.sharded import is_sharded

if TYPE_CHECKING:
    from lowprec.optim import AdamW

POLICIES = ("none", "selective", "full", "offload")
"""The fastest first: the less is computed again, the faster."""
NOT_SELECTIVE = "gradient_checkpointing=selective chooses among operations as they come"


@dataclass(slots=True)
class Activations:
    """The policy that runs."""

    policy: str
    why: str
    function: Callable[..., Any] | None = None
    graphs: LayerGraphs | None = None
    no_graphs: str = ""
    """Why there are none, where that is to be told."""

    def to_dict(self) -> dict[str, Any]:
        """For the report; what ``selective`` keeps is known after the first step."""
        kept = self.function.describe() if isinstance(self.function, Selective) else None
        facts = {"policy": self.policy, "why": self.why} | ({"kept": kept} if kept else {})
        if self.no_graphs:
            return facts | {"cuda_graphs": {"why_not": self.no_graphs}}
        return facts | ({"cuda_graphs": self.graphs.to_dict()} if self.graphs else {})

    def update_in_backward(self, optimizer: "AdamW") -> None:
        """Let the optimizer update in backward, from gradients that are not copied where it uses them up at once."""
        optimizer.update_in_backward()
        if self.graphs is not None:
            self.graphs.lends_gradient = None if self.graphs.shares_parameters else optimizer.uses_gradient_at_once

    @property
    def recording_s(self) -> float:
        """What recording layers has taken so far."""
        return self.graphs.seconds if self.graphs is not None else 0.0

    def forget_graphs(self) -> None:
        """Give the memory of the graphs back before something that takes the ordinary path and needs it."""
        if self.graphs is not None:
            self.graphs.forget()

    def told(self) -> str:
        """For people."""
        graphs = f" No CUDA graphs: {self.no_graphs}." if self.no_graphs else ""
        return f"Activations: {self.policy} ({self.why}).{graphs or (' Layers as CUDA graphs.' if self.graphs else '')}"


def keep_activations(
    model: nn.Module,
    policy: str,
    why: str = "as the recipe says",
    *,
    graphs: bool = False,
    no_graphs: str = "",
) -> Activations:
    """Let every decoder layer of this one model keep for backward what the policy says.

    Args:
        model: of transformers, bare or with PEFT's adapters.
        policy: ``none`` keeps all; ``full`` keeps a layer's input and computes the layer again; ``selective`` keeps
            also the results that are dear to compute and cheap to hold; ``offload`` is ``full`` with the inputs in host
            memory.
        why: for the report.
        graphs: replay layers as CUDA graphs (graphs.py).
        no_graphs: why there are none, for the report.

    Raises:
        UserError: the architecture has no layers that can be computed again.
    """
    functions: dict[str, Callable[[], Callable[..., Any] | None]] = {
        "none": lambda: None,
        "full": lambda: partial(checkpoint, use_reentrant=False),
        "selective": Selective,
        "offload": Offload,
    }
    assert policy in functions, policy
    function = functions[policy]()
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if function is not None and not layers:
        raise UserError(
            f"train.gradient_checkpointing={policy}: {type(model).__name__} has no layers that transformers could "
            "compute again. Set train.gradient_checkpointing=none."
        )
    shared = LayerGraphs(recompute=policy != "none") if graphs else None
    for layer in layers:
        own: Callable[..., Any] | None = function
        if shared is not None and isinstance(layer, GradientCheckpointingLayer):
            saving = function.saving if isinstance(function, Offload) else nullcontext
            own = GraphedLayer(layer, shared, function, saving)
        layer.gradient_checkpointing = own is not None  # type: ignore[assignment]
        if own is not None:
            layer._gradient_checkpointing_func = own  # type: ignore[assignment]
    return Activations(policy, why, function, shared, no_graphs)


def why_no_graphs(model: Any, policy: str, device: torch.device, packed: torch.dtype | None = None) -> str | None:
    """Why the layers of a model cannot be replayed as CUDA graphs, as far as it can be said beforehand.

    Args:
        packed: for packed rows the dtype in which attention is computed, else None.
    """
    if device.type != "cuda":
        return "there is no CUDA device"
    if policy == "selective":
        return NOT_SELECTIVE
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        return f"{type(model).__name__} has no layers of transformers' own kind"
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return "its parameters are sharded"
    if packed is not None:
        dim = head_dim(model.config.get_text_config())
        reason = why_no_flash_of(dim, packed, torch.cuda.get_device_capability(device))
        return None if reason is None else f"rows are packed, which takes FlashAttention: {reason}"
    return None
