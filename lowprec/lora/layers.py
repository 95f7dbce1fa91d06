"""PEFT's LoRA layers with another ``forward``: names, parameters, saving, merging and unloading stay PEFT's.

A group is a set of layers that read one input, such as q, k and v. Its first layer computes all of them and leaves the
others' results in the model's ``Handoff``, where each finds its own if it is called with that very tensor. Whoever
finds nothing computes itself alone: the result is right whatever order a model calls its layers in.
"""

from dataclasses import dataclass, field

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import nn

from lowprec.lora import bases
from lowprec.lora.product import Projection, project


class Handoff:
    """Results that wait for their layers: those of one group at a time in the whole model, so that nothing piles up
    when a model leaves some unread."""

    def __init__(self) -> None:
        self.clear()

    def clear(self, *_: object) -> None:
        """Also a forward hook of the model: nothing outlives a pass, not even one that failed."""
        self._x: torch.Tensor | None = None
        self._state: tuple = ()
        self._waiting: dict[int, torch.Tensor] = {}

    def put(self, x: torch.Tensor, results: dict[int, torch.Tensor]) -> None:
        """``results``: ``id`` of a layer -> what it will return for ``x``. ``x`` is held, so that its place in memory
        cannot be another tensor's meanwhile."""
        self._x, self._state, self._waiting = x, _state(x), results

    def take(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The result that waits for this layer: for this very tensor, unchanged, in the same mode."""
        if x is not self._x or id(layer) not in self._waiting or _state(x) != self._state:
            return None
        result = self._waiting.pop(id(layer))
        if not self._waiting:
            self.clear()
        return result

    def __getstate__(self) -> dict:
        return {}  # copies and pickles of a model begin empty

    def __setstate__(self, state: dict) -> None:
        self.clear()


def _state(x: torch.Tensor) -> tuple:
    """What else a result depends on: the tensor's version, whether a graph is recorded, the dtype of products."""
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _product_dtype(x)


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


@dataclass
class Place:
    """A layer's part in its model: its adapter, the model's handoff, and on a group's first layer the others."""

    adapter: str
    handoff: Handoff
    leads: "list[_Fused]" = field(default_factory=list)
    follows: bool = False


class _Fused:
    """In front of PEFT's class in the order of inheritance."""

    place: Place

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not self._ready():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        place = self.place
        if place.follows:
            found = place.handoff.take(self, x)  # type: ignore[arg-type]
            if found is not None:
                return found
        layers = [self, *(layer for layer in place.leads if layer._ready())]
        outputs = project(x.to(_product_dtype(x)), [layer._projection() for layer in layers])
        results = [layer._as_peft_returns(y, x) for layer, y in zip(layers, outputs, strict=True)]
        if len(layers) > 1:
            place.handoff.put(x, {id(layer): y for layer, y in zip(layers[1:], results[1:], strict=True)})
        return results[0]

    def _ready(self) -> bool:
        """Whether PEFT would do just what the fused product does, in this call."""
        peft: Linear = self  # type: ignore[assignment]
        return (
            not (peft.disable_adapters or peft.merged)
            and peft.active_adapters == [self.place.adapter]
            and not torch.compiler.is_compiling()
        )

    def _projection(self) -> Projection:
        peft: Linear = self  # type: ignore[assignment]
        name, base = self.place.adapter, peft.get_base_layer()
        a, b = peft.lora_A[name].weight, peft.lora_B[name].weight
        return Projection(base, peft.scaling[name], a, b, base.bias)  # type: ignore[arg-type]

    def _as_peft_returns(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.to(x.dtype) if bases.returns_input_dtype(self.get_base_layer()) else y  # type: ignore[attr-defined]


class FusedLinear(_Fused, Linear):
    """PEFT's LoRA on a linear layer, fused."""


class FusedLinear4bit(_Fused, Linear4bit):
    """PEFT's LoRA on a 4-bit layer, fused."""


FUSED: dict[type[nn.Module], type[nn.Module]] = {Linear: FusedLinear, Linear4bit: FusedLinear4bit}
"""PEFT's class -> the one that a layer of it becomes."""


def why_not(layer: nn.Module) -> str | None:
    """Why PEFT's path stays, in words for the report; None where the layer can be fused."""
    if type(layer) not in FUSED:
        return f"PEFT adapts it as a {type(layer).__name__}"
    assert isinstance(layer, Linear | Linear4bit)
    active = layer.active_adapters
    if len(active) != 1 or active[0] not in layer.lora_A:
        return f"{len(active)} adapters are active" if len(active) != 1 else "the active adapter is not on it"
    name = active[0]
    if layer.merged:
        return "its adapter is merged"
    if name in layer.lora_variant:
        return f"a variant of LoRA ({type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')})"
    dropout = layer.lora_dropout[name]
    if not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) != 0:
        return "lora_dropout is not 0"
    if layer.lora_bias[name]:
        return "its B has a bias"
    if type(layer.lora_A[name]) is not nn.Linear or type(layer.lora_B[name]) is not nn.Linear:
        return "its A or B is not a plain linear layer"
    return bases.why_not(layer.get_base_layer())


def become_fused(layer: nn.Module, place: Place) -> None:
    """Give this one instance the fused ``forward``."""
    layer.__class__ = FUSED[type(layer)]
    layer.place = place  # type: ignore[assignment]
