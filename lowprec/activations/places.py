"""Fixed places in memory, which CUDA graphs read and write."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

ALIGNMENT = 64
"""Elements; kernels read tensors that begin at multiples of 16 bytes in wider words."""


class Flow:
    """What goes from layer to layer, for all shapes of other arguments.

    Args:
        hidden: a layer's input, ``[rows, tokens, width]``; its shape and dtype are taken.
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        self.g = torch.zeros_like(hidden.detach())
        """The gradient of a layer's result before its backward, of its input after that."""
        self._x: torch.Tensor | None = None
        self._last: weakref.ref[torch.Tensor] | None = None
        self._version = 0

    @property
    def x(self) -> torch.Tensor:
        """A layer's input before its forward, its result after that."""
        if self._x is None:
            self._x = torch.zeros_like(self.g)
        return self._x

    def input_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Where a layer that keeps its input finds it: where the layer before leaves its result, else a new place."""
        return hidden.detach() if self._is_last(hidden) else torch.zeros_like(self.g)

    def hold(self, hidden: torch.Tensor) -> None:
        """Copy ``hidden`` to ``x``, unless it is there."""
        if not self._is_last(hidden):
            self.x.copy_(hidden)
        self.holds(hidden)

    def holds(self, hidden: torch.Tensor) -> None:
        """``hidden`` is what stands in ``x``, or where a layer that keeps its input left its result."""
        self._last, self._version = weakref.ref(hidden), hidden._version

    def _is_last(self, hidden: torch.Tensor) -> bool:
        return self._last is not None and self._last() is hidden and self._version == hidden._version

    def forget(self) -> None:
        """Nothing is known of what ``x`` holds."""
        self._last = None


class Place:
    """What the graphs of all layers share for one shape of input and other arguments.

    Args:
        flow: for a layer's input and result.
        arguments: the other tensors that a layer is called with.
    """

    def __init__(self, flow: Flow, arguments: Sequence[torch.Tensor]) -> None:
        self.flow = flow
        self.arguments = tuple(argument.detach().clone() for argument in arguments)
        self.layout: tuple[tuple, dict[str, Any]] = (), {}
        """Positional and named arguments of a layer beside its input, with the tensors above where those stood."""
        self.runs: weakref.WeakSet[Any] = weakref.WeakSet()
        """Passes of layers whose backward is to come."""
        self._sources: list[tuple[torch.Tensor, int] | None] = [None] * len(self.arguments)

    def load(self, arguments: Sequence[torch.Tensor]) -> None:
        """Copy the arguments that are not there yet."""
        for index, (source, place) in enumerate(zip(arguments, self.arguments, strict=True)):
            known = self._sources[index]
            if known is None or known[0] is not source or known[1] != source._version:
                place.copy_(source)
                self._sources[index] = source, source._version

    def forget(self) -> None:
        """Nothing is known of what the places hold."""
        self.flow.forget()
        self._sources = [None] * len(self.arguments)


class GradientPlace:
    """The gradients of a layer's parameters side by side, one tensor for each dtype."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = [(p.dtype, p.shape, -(-p.numel() // ALIGNMENT) * ALIGNMENT) for p in parameters]
        sizes: dict[torch.dtype, int] = {}
        for dtype, _, size in self._parameters:
            sizes[dtype] = sizes.get(dtype, 0) + size
        device = parameters[0].device if parameters else None
        self._flat = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        self._views = self._split(self._flat)

    def _split(self, flat: dict[torch.dtype, torch.Tensor]) -> list[torch.Tensor]:
        parts = {
            dtype: iter(whole.split([size for kind, _, size in self._parameters if kind == dtype]))
            for dtype, whole in flat.items()
        }
        return [next(parts[dtype])[: shape.numel()].view(shape) for dtype, shape, _ in self._parameters]

    def fill(self, gradients: Sequence[torch.Tensor | None]) -> list[bool]:
        """Copy what one layer's backward found; False for a parameter that it does not use (None)."""
        pairs = [(view, g) for view, g in zip(self._views, gradients, strict=True) if g is not None]
        if pairs:
            views, found = zip(*pairs, strict=True)
            torch._foreach_copy_(list(views), list(found))
        return [gradient is not None for gradient in gradients]

    def taken(self, used: Sequence[bool]) -> list[torch.Tensor | None]:
        """Copies of the gradients of the used parameters: the place is free again."""
        parts = self._split({dtype: whole.clone() for dtype, whole in self._flat.items()})
        return [part if is_used else None for part, is_used in zip(parts, used, strict=True)]
