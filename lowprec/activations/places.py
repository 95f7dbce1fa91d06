"""Fixed places in memory, which CUDA graphs read and write, and what is copied to and from them."""

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowprec.data.documents import Documents

ALIGNMENT = 64
"""Elements; kernels read tensors that begin at multiples of 16 bytes in wider words."""
SIDE_BY_SIDE = 1 << 20
"""Elements at most of a gradient whose copy shares its memory with others."""


class _Mark:
    """Which tensor's values a place holds."""

    def __init__(self) -> None:
        self._tensor: weakref.ref[torch.Tensor] | None = None
        self._version = 0

    def put(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), tensor._version

    def stands_for(self, tensor: torch.Tensor) -> bool:
        return self._tensor is not None and self._tensor() is tensor and self._version == tensor._version

    def clear(self) -> None:
        self._tensor = None


class Flow:
    """What goes from layer to layer, for all shapes of other arguments.

    Args:
        hidden: a layer's input, ``[rows, tokens, width]``; its shape and dtype are taken.
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        self.g = torch.zeros_like(hidden.detach())
        """The gradient of a layer's result before its backward, of its input after that."""
        self._x: torch.Tensor | None = None
        self._in_x, self._in_g = _Mark(), _Mark()

    @property
    def x(self) -> torch.Tensor:
        """A layer's input before its forward, its result after that."""
        if self._x is None:
            self._x = torch.zeros_like(self.g)
        return self._x

    def input_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Where a layer that keeps its input finds it: where the layer before leaves its result, else a new place."""
        return hidden.detach() if self._in_x.stands_for(hidden) else torch.zeros_like(self.g)

    def hold(self, hidden: torch.Tensor) -> None:
        """Copy ``hidden`` to ``x``, unless it is there."""
        if not self._in_x.stands_for(hidden):
            self.x.copy_(hidden)
        self.holds(hidden)

    def holds(self, hidden: torch.Tensor) -> None:
        """``hidden`` is what stands in ``x``, or where a layer that keeps its input left its result."""
        self._in_x.put(hidden)

    def hold_gradient(self, gradient: torch.Tensor) -> None:
        """Copy ``gradient`` to ``g``, unless it is there."""
        if not self._in_g.stands_for(gradient):
            self.g.copy_(gradient)
        self._in_g.clear()  # the layer that asks for it writes over it

    def gradient(self) -> torch.Tensor:
        """A copy of ``g``: autograd may keep it until the gradients of other branches are there."""
        copy = self.g.clone()
        self._in_g.put(copy)
        return copy

    def forget(self) -> None:
        """Nothing is known of what the places hold."""
        self._in_x.clear()
        self._in_g.clear()


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
        self.last_index = -1
        """Of the layer that was recorded last."""
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


def copies(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Contiguous copies; None stays None. Small ones share one tensor for each dtype, a larger one has memory of its
    own, which goes with it: updates in backward need some gradients longer than others."""
    made: list[Any] = [None] * len(gradients)
    small: dict[torch.dtype, list[int]] = {}
    for i, gradient in enumerate(gradients):
        if gradient is not None and gradient.numel() > SIDE_BY_SIDE:
            made[i] = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
        elif gradient is not None:
            small.setdefault(gradient.dtype, []).append(i)
    for places in small.values():
        for i, piece in zip(places, _side_by_side([gradients[i] for i in places]), strict=True):
            made[i] = piece
    found = [gradient for gradient in gradients if gradient is not None]
    if found:
        torch._foreach_copy_([copy for copy in made if copy is not None], found)
    return made


def _side_by_side(forms: Sequence[Any]) -> list[torch.Tensor]:
    """New tensors of these shapes and one dtype in one, each aligned."""
    places: list[int] = []
    filled: list[torch.Tensor] = []
    for form in forms:
        places.append(len(filled))
        filled.append(form)
        if padding := -form.numel() % ALIGNMENT:
            filled.append(_filler(padding))
    flat = torch.empty(sum(form.numel() for form in filled), dtype=forms[0].dtype, device=forms[0].device)
    # All in one call: cut one by one, the 14 of a layer with LoRA took the host 0.1 ms, in each of 30 layers.
    pieces = torch._C._nn.unflatten_dense_tensors(flat, filled)
    return [pieces[place] for place in places]


@cache
def _filler(numel: int) -> torch.Tensor:
    """A form of so many elements, without memory."""
    return torch.empty(numel, device="meta")


class _Memory:
    """So many bytes of a CUDA device from an address on, for ``torch.as_tensor``; ``owner`` lives as long as that."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        described = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3}
        self.__cuda_array_interface__ = described


def unowned(tensor: torch.Tensor, owner: object) -> torch.Tensor:
    """A tensor on the same memory that does not keep the allocator from giving it to others. It keeps ``owner``, with
    which the memory would go."""
    if not tensor.numel():
        return tensor
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    flat = torch.as_tensor(_Memory(tensor.data_ptr(), span * tensor.itemsize, owner), device=tensor.device)
    return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def tensors_of(arguments: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """What tells calls of one form from others, and the tensors.

    Raises:
        TypeError: there is something that no place can be made for.
    """
    leaves, structure = tree_flatten(arguments)
    tensors: list[torch.Tensor] = []
    kinds: list[tuple] = []
    for leaf in leaves:
        if isinstance(leaf, Documents):
            rounded = leaf.rounded()
            tensors.append(rounded.borders)
            kinds.append((Documents, len(rounded.borders), rounded.longest))
        elif isinstance(leaf, torch.Tensor) and not leaf.requires_grad:
            tensors.append(leaf)
            kinds.append((torch.Tensor, leaf.shape, leaf.dtype, leaf.device))
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            kinds.append((type(leaf), leaf))
        else:
            raise TypeError(f"a layer is called with a {type(leaf).__name__}")
    return (str(structure), tuple(kinds)), tuple(tensors)


def with_tensors(arguments: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    """``arguments`` with others in the places of its tensors, in the order of ``tensors_of``."""
    leaves, structure = tree_flatten(arguments)
    others = iter(tensors)

    def other(leaf: Any) -> Any:
        if isinstance(leaf, Documents):
            return Documents((), next(others), leaf.rounded().longest)
        return next(others) if isinstance(leaf, torch.Tensor) else leaf

    return tree_unflatten([other(leaf) for leaf in leaves], structure)
