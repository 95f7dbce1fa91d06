"""Decoder layers replayed as CUDA graphs.

Forward and backward of one layer are about 80 kernels, and a host may need longer to launch them than the device to run
them: for Llama-3-8B QLoRA, 2 x 2048 tokens, on an H100 a step took 646 ms, of which the device worked 368. A graph is
launched as one. It repeats the kernels of an ordinary call of the layer, on the same addresses: so everything that
changes from step to step is copied to fixed places before, and results are copied from there.

Every layer has two graphs for each shape of input: forward (as the policy has it, under PyTorch's checkpoint where the
layer is computed again), and backward, with that computation. With ``full`` and ``offload`` all graphs share the memory
for what a layer needs while it runs, and two places: ``x`` for a layer's input and, after it, its result; ``g`` for the
gradient of its result and, after it, of its input. With ``none`` each layer's graph holds what backward needs, and its
result is the next one's input where it lies; the layers of one shape share that memory with those of another, so that
passes of two shapes cannot be under way at a time.

A shape is recorded when it comes for the third time, up to ``MOST_SHAPES`` of them; whatever else comes takes the
ordinary path, with the same numbers. So does a layer that is watched (hooks, modes that see every operation), that
draws random numbers, or whose trained parameters were moved. The borders of packed samples are filled up with empty
samples, so that few numbers of them come.

With ``none`` a layer's result lies in the graphs' memory: the next pass writes over it, so who wants to keep it has to
copy it.
"""

import copy
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import is_not
from typing import Any

import torch
from torch import nn

from lowprec.activations.places import Flow, Place, tensors_of, with_tensors
from lowprec.activations.recorded import Recorded, Recorder, Replayed, Run

SEEN_BEFORE = 2
"""Ordinary calls for a shape before it is recorded: kernels are compiled and tuned in them."""
MOST_SHAPES = 8


class LayerGraphs:
    """What the graphs of one model share, and what became of them."""

    def __init__(self, recompute: bool, recorder: Any = None) -> None:
        self.recompute = recompute
        self.recorder = recorder or Recorder()
        self.places: dict[Any, Place] = {}
        """Of each shape, the latest one last."""
        self.reason = ""
        """Why there are none, where recording was tried."""
        self.ordinary: set[str] = set()
        """Why some calls were not recorded."""
        self.recorded: dict[tuple[Any, Any], Recorded] = {}
        """(a layer's function, key of a shape) -> its graphs."""
        self.seconds = 0.0
        self.layers: list[GraphedLayer] = []
        """In the order of the model."""
        self.lends_gradient: Callable[[torch.Tensor], bool] | None = None
        """Asked in backward: whether a parameter's hooks use up its gradient, which then is not copied
        from where the graph leaves it. None: all are copied."""
        self._flows: dict[Any, Flow] = {}
        self._signatures: dict[Any, int] = {}
        self._last: tuple[tuple, int, tuple[torch.Tensor, ...]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        figures = {"shapes": len(self.places), "graphs": 2 * len(self.recorded), "recording_s": round(self.seconds, 2)}
        reasons = {"why_not": self.reason, "ordinary_path": sorted(self.ordinary)}
        return figures | {name: value for name, value in reasons.items() if value}

    def arguments(self, rest: tuple, keywords: dict[str, Any]) -> tuple[int, tuple[torch.Tensor, ...]] | None:
        """What a layer is called with beside its input: a number for its structure, shapes and plain values, and its
        tensors. None where there is something that no place can be made for."""
        values = (*rest, *keywords.values())
        # Layers of one pass are given the very same objects.
        if self._last is None or len(self._last[0]) != len(values) or any(map(is_not, self._last[0], values)):
            try:
                signature, tensors = tensors_of((rest, keywords))
            except TypeError as error:
                self.ordinary.add(str(error))
                return None
            self._last = values, self._signatures.setdefault(signature, len(self._signatures)), tensors
        return self._last[1:]

    @property
    def shares_parameters(self) -> bool:
        """Whether a parameter is in several layers: its gradient then waits for that of the other one."""
        counts = Counter(id(p) for layer in self.layers for p in layer.layer.parameters() if p.requires_grad)
        return any(count > 1 for count in counts.values())

    def place(self, key: Any, index: int, hidden: torch.Tensor, arguments: Any, tensors: tuple) -> Place | None:
        """The fixed places of a shape for layer number ``index``, made now if they were not there. None where there
        are enough shapes, or where what the layer keeps for backward would lie in memory that another one uses
        meanwhile: graphs use again what those recorded before them give back, which are to be of lower layers."""
        if key in self.places:
            place = self.places[key]
            if not self.recompute and (key != next(reversed(self.places)) or index <= place.last_index):
                self.ordinary.add("a layer came after others of its shape were recorded")
                return None
            place.last_index = index
            return place
        if len(self.places) == MOST_SHAPES:
            self.ordinary.add(f"more than {MOST_SHAPES} shapes came")
            return None
        if not self.recompute and self.others_run(None):
            self.ordinary.add("a shape came while another one's backward was to come")
            return None
        self.recorder.prepare()
        for recorded in self.recorded.values():
            recorded.give_memory_back()
        form = hidden.shape, hidden.dtype
        if form not in self._flows:
            self._flows[form] = Flow(hidden)
        place = self.places[key] = Place(self._flows[form], tensors)
        place.last_index = index
        # .data has a version counter of its own: the places are written to between forward and backward.
        place.layout = with_tensors(arguments, tuple(argument.data for argument in place.arguments))
        return place

    def others_run(self, place: Place | None) -> bool:
        """Whether a pass of another shape than this place's waits for its backward."""
        return any(other.runs for other in self.places.values() if other is not place)

    def give_up(self, error: BaseException) -> None:
        """No graphs from now on."""
        while error.__context__ is not None:  # the first error is the cause, the last one that recording had failed
            error = error.__context__
        self.reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        warnings.warn(f"layers run kernel by kernel, since recording one failed: {self.reason}", stacklevel=2)
        self._clear()

    def forget(self) -> None:
        """Give all memory back between steps. What comes for the third time from now on is recorded again."""
        self._clear()
        self.recorder.forget()
        for layer in self.layers:
            layer.forget()

    def _clear(self) -> None:
        self.places.clear()
        self.recorded.clear()
        self._flows.clear()


class GraphedLayer:
    """The checkpoint function of one decoder layer: the layer's graphs where there are some, else the policy.

    Args:
        layer: of transformers.
        graphs: shared by the layers of the model.
        policy: what the layer does without graphs: a function like PyTorch's ``checkpoint``; None calls it.
        saving: the context in which a layer's input is saved for backward, as ``offload`` needs.
    """

    def __init__(
        self,
        layer: nn.Module,
        graphs: LayerGraphs,
        policy: Callable[..., Any] | None,
        saving: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.layer, self.graphs, self.policy, self.saving = layer, graphs, policy, saving
        self._hooks = [
            hooks for m in layer.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ]
        self.index = len(graphs.layers)
        graphs.layers.append(self)
        self.runs: weakref.WeakSet[Run] = weakref.WeakSet()
        """Passes whose backward is to come."""
        self._seen: Counter[Any] = Counter()
        self._random: set[Any] = set()

    def forget(self) -> None:
        """As if no shape had come."""
        self._seen.clear()

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.policy or _call, memo)  # a copy of the model begins without graphs

    def __call__(self, function: Any, *args: Any) -> Any:
        if not args or not args[0].is_contiguous() or self._is_watched():
            return (self.policy or _call)(function, *args)
        hidden, *rest = args
        given = self.graphs.arguments(tuple(rest), function.keywords)
        if given is None:
            return (self.policy or _call)(function, *args)
        signature, tensors = given
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        place = (hidden.shape, hidden.dtype, autocast, signature)
        key = (place, hidden.requires_grad)  # the input of the first layer may need no gradient
        recorded = self.graphs.recorded.get((self, key))
        if recorded is None:
            if self._seen[key] < SEEN_BEFORE or key in self._random:
                return self._watching_chance(key, function, *args)
            recorded = self._record(key, function, hidden, (tuple(rest), function.keywords), tensors)
        if recorded is None or not recorded.is_current():
            return (self.policy or _call)(function, *args)
        with self.saving():
            return Replayed.apply(hidden, recorded, tensors, *recorded.parameters)

    def _watching_chance(self, key: Any, function: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        """The ordinary path; what draws random numbers there is never recorded."""
        self._seen[key] += 1
        before = _random_offset(hidden)
        result = (self.policy or _call)(function, hidden, *rest)
        if before != _random_offset(hidden):
            self._random.add(key)
            self.graphs.ordinary.add("a layer draws random numbers")
        return result

    def _record(
        self, key: Any, function: Any, hidden: torch.Tensor, arguments: Any, tensors: tuple
    ) -> "Recorded | None":
        begin = time.perf_counter()
        try:
            place = self.graphs.place(key[0], self.index, hidden, arguments, tensors)
            if place is None:
                return None
            rest, keywords = place.layout

            def call(x: torch.Tensor) -> Any:
                return function.func(*function.args, x, *rest, **keywords)

            recorded = Recorded(self, call, hidden, place)
        except (RuntimeError, TypeError, ValueError) as error:  # what no graph can hold, or no memory for it
            self.graphs.give_up(error)
            return None
        self.graphs.seconds += time.perf_counter() - begin
        self.graphs.recorded[self, key] = recorded
        return recorded

    def _is_watched(self) -> bool:
        """Whether there are no graphs now, or somebody looks at what happens inside, which a replay does not show."""
        if self.graphs.reason or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return True
        return bool(torch._C._len_torch_dispatch_stack()) or any(self._hooks)


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


def _random_offset(tensor: torch.Tensor) -> Any:
    """Changes when random numbers are drawn on the tensor's device. The host knows it."""
    if tensor.is_cuda:
        return torch.cuda.default_generators[tensor.device.index].get_offset()
    return torch.random.get_rng_state().numpy().tobytes()
