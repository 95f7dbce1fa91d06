"""Follows a real step or a traced one, operator by operator: which storages are alive, what is multiplied and moved.

The method is that of ``torch.distributed._tools.mem_tracker`` (weak references to storages below a dispatch mode), but
the events themselves are kept, not only peaks.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowprec.plan.operators import hidden_bytes, products_of
from lowprec.plan.tape import STILL, Tape

FORWARD, LOSS, BACKWARD, UPDATE = "forward", "loss", "backward", "update"
PHASES = (FORWARD, LOSS, BACKWARD, UPDATE)

_ADD = torch.ops.aten.add.Tensor
_ASKS_DEVICE = torch.ops.prim.device.default
_NO_KERNEL = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided}


class Tracker(TorchDispatchMode):
    """Writes ``tape`` while it is entered. ``vocab_size`` tells logits, and gradients of embeddings, by their shape."""

    def __init__(self, vocab_size: int | None = None):
        super().__init__()
        self.tape = Tape()
        self.tape.begin(STILL)
        self.keeps = False
        """Whether what comes now is kept for backward (in forward, and in recomputed forward)."""
        self._vocab_size = vocab_size
        self._sum: tuple[int, int] | None = None
        """Autograd's sum of two gradients that was the last call: the storages of the older one and of the sum."""
        self._number: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under it, and the guard against that costs as much as a call

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _ASKS_DEVICE:  # half of all calls
            return args[0].fake_device if type(args[0]) is FakeTensor else func(*args, **kwargs)
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # to read shapes and storages is no call of the model's
            inputs, outputs = list(_tensors(args)), list(_tensors(out))
            if kwargs:
                inputs += _tensors(tuple(kwargs.values()))
            numbers = [self._meet(tensor) for tensor in outputs]
            self._sum = (self._meet(inputs[0]), numbers[0]) if func is _ADD and _by_autograd() else None
            if not func.is_view and func.overloadpacket not in _NO_KERNEL and (outputs or func._schema.is_mutable):
                self._count(func, args, kwargs, inputs, outputs)
        return out

    def _count(self, func: Any, args: tuple, kwargs: dict, inputs: list, outputs: list) -> None:
        hidden = hidden_bytes(func, args, kwargs, outputs)
        run = self.tape.runs[-1]
        if hidden:
            number = self._new(hidden, "workspace")
            run.events += (2 * number, 2 * number + 1)
        run.calls += 1
        run.own_calls += func.namespace == "lowprec"
        products = products_of(func, args, outputs)
        if products:
            run.products.update(products)
        else:
            # What is expanded is read once.
            run.moves[sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*inputs, *outputs))] += 1

    def hold(self, tensor: torch.Tensor, kind: str) -> None:
        """Say what a storage is, whether it has been met or not."""
        with torch._C.DisableTorchFunction():
            self.tape.kinds[self._meet(tensor)] = kind

    def reserve(self, nbytes: int, kind: str) -> None:
        """Something that stays and is no tensor of the trace."""
        self.tape.runs[-1].events.append(2 * self._new(nbytes, kind))

    def _meet(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        place = storage._cdata
        number = self._number.get(place)
        if number is None:
            number = self._new(storage.nbytes(), self._kind(tensor))
            self._number[place] = number
            self._references[number] = weakref.ref(storage, self._gone(number, place))
            self.tape.runs[-1].events.append(2 * number)
        return number

    def _kind(self, tensor: torch.Tensor) -> str:
        """What is not told by ``hold``, by its shape and by when it comes."""
        if self._vocab_size is not None and tensor.ndim > 1:
            if tensor.shape[-1] == self._vocab_size:
                return "logits"
            if tensor.shape[0] == self._vocab_size:  # of the embeddings or the head, before it is theirs
                return "gradients"
        return "activations" if self.keeps else "workspace"

    def _new(self, nbytes: int, kind: str) -> int:
        self.tape.sizes.append(nbytes)
        self.tape.kinds.append(kind)
        return len(self.tape.sizes) - 1

    def _gone(self, number: int, place: int) -> Callable[[weakref.ref], None]:
        def note(reference: weakref.ref) -> None:
            del self._references[number]
            if self._number.get(place) == number:
                del self._number[place]
            events = self.tape.runs[-1].events
            # Under a dispatch mode autograd adds two gradients to a third; without one it adds to the older of them
            # where nobody else holds that, so that it goes as soon as the sum is there.
            in_place = self._sum is not None and self._sum[0] == number and events[-1:] == [2 * self._sum[1]]
            events.insert(len(events) - in_place, 2 * number + 1)

        return note


def _by_autograd() -> bool:
    """Whether the operator that is dispatched was called by autograd's engine and by no function in Python."""
    return sys._getframe(2).f_code.co_name == "_engine_run_backward"


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
