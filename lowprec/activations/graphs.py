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
from functools import partial
from operator import is_not
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lowprec.activations.places import Flow, Place, copies, unowned
from lowprec.data.documents import Documents
from lowprec.layers.decode_buffer import release_decode_buffers
from lowprec.machine.timing import capture_stream

SEEN_BEFORE = 2
"""Ordinary calls for a shape before it is recorded: kernels are compiled and tuned in them."""
MOST_SHAPES = 8

Replay = Callable[[], None]
Left = list[torch.Tensor | None]


class Recorder:
    """Records what a function launches. All graphs share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def prepare(self) -> None:
        """Give back what ordinary calls left in the allocator: graphs cannot use it."""
        torch.cuda.synchronize()
        release_decode_buffers()
        torch.cuda.empty_cache()

    def record(self, function: Callable[[], Left]) -> tuple[Replay, Left]:
        """The replay, and what the function gives: tensors that replays write to, on memory that graphs recorded later
        may use, too, once nobody else holds it.

        Raises:
            What ``function`` raises, and RuntimeError for what no graph can hold.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(capture_stream(torch.cuda.current_device())):
            # Other threads may go on allocating and waiting while this one records.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                left = function()
            finally:
                graph.capture_end()
        return graph.replay, [None if tensor is None else unowned(tensor, graph) for tensor in left]


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
        self.recorded: dict[tuple[Any, Any], _Recorded] = {}
        """(a layer's function, key of a shape) -> its graphs."""
        self.seconds = 0.0
        self.layers: list[GraphedLayer] = []
        """In the order of the model."""
        self.lends_gradients = False
        """Whether a parameter's hooks use up its gradient, which then is not copied from where the graph leaves it."""
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
                signature, tensors = _tensors_of((rest, keywords))
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
        place.layout = _with_tensors(arguments, tuple(argument.data for argument in place.arguments))
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
        self.runs: weakref.WeakSet[_Run] = weakref.WeakSet()
        """Passes whose backward is to come."""
        self._seen: Counter[Any] = Counter()
        self._random: set[Any] = set()

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
            return _Replayed.apply(hidden, recorded, tensors, *recorded.parameters)

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
    ) -> "_Recorded | None":
        begin = time.perf_counter()
        try:
            place = self.graphs.place(key[0], self.index, hidden, arguments, tensors)
            if place is None:
                return None
            rest, keywords = place.layout

            def call(x: torch.Tensor) -> Any:
                return function.func(*function.args, x, *rest, **keywords)

            recorded = _Recorded(self, call, hidden, place)
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


class _Recorded:
    """The two graphs of one layer for one shape."""

    def __init__(self, graphed: GraphedLayer, call: Callable, hidden: torch.Tensor, place: Place) -> None:
        self.graphs, self.layer_runs, self.place, self.flow = graphed.graphs, graphed.runs, place, place.flow
        layer, recorder, flow = graphed.layer, graphed.graphs.recorder, place.flow
        self.recompute = recompute = graphed.graphs.recompute
        self.parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]
        self._needs_input = hidden.requires_grad
        self.x = flow.x if recompute else flow.input_of(hidden)
        self._held: Any = None
        kind = hidden.device.type
        options = {"enabled": torch.is_autocast_enabled(kind), "cache_enabled": False}
        autocast = partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), **options)
        leaf = self.x.data.requires_grad_(self._needs_input)
        # Autograd has one node for each parameter, on the stream where it was first used: what the graph records on a
        # stream of its own would wait for that one. So the layer computes with other tensors on the same memory.
        names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        aliases = [parameter.detach().requires_grad_() for parameter in self.parameters]
        aliased = partial(
            functional_call, _Call(layer, call), {f"layer.{n}": t for n, t in zip(names, aliases, strict=True)}
        )

        def forward() -> Left:
            with torch.enable_grad(), autocast():
                again = partial(checkpoint, aliased, use_reentrant=False, preserve_rng_state=False)
                y = again(leaf) if recompute else aliased(leaf)
            if not isinstance(y, torch.Tensor) or y.shape != hidden.shape or y.dtype != hidden.dtype:
                raise TypeError(f"{type(layer).__name__} gives something else than it is given")
            self._held = get_gradient_edge(y), y.detach()
            if not recompute:
                return [y.detach()]
            self.x.copy_(y.detach())
            return []

        def backward() -> Left:
            wanted = [*([leaf] if self._needs_input else []), *aliases]
            found = torch.autograd.grad(self._held[0], wanted, flow.g, retain_graph=not recompute, allow_unused=True)
            if self._needs_input:
                flow.g.copy_(found[0])
            return list(found[self._needs_input :])

        results: Left
        self._forward: Replay
        self._backward: Replay
        self._gradients: Left
        with torch.no_grad():
            self._forward, results = recorder.record(forward)
            self._backward, self._gradients = recorder.record(backward)
        self._y = None if recompute else results[0]
        if recompute:
            self.give_memory_back()
        place.forget()

    def give_memory_back(self) -> None:
        """Let graphs that are recorded from now on use the memory that this one's replays write to."""
        self._held = None

    def is_current(self) -> bool:
        """Whether the parameters are where they were, and, where the graphs hold what backward needs, nobody needs what
        a replay would write over: a second forward pass before the first one's backward takes the ordinary path."""
        if [p.data_ptr() for p in self.parameters if p.requires_grad] != self._addresses:
            return False
        return self.recompute or not (self.layer_runs or self.graphs.others_run(self.place))

    def run_forward(self, hidden: torch.Tensor, arguments: tuple, run: "_Run") -> torch.Tensor:
        self.place.load(arguments)
        if self.recompute:
            self.flow.hold(hidden)
        elif hidden.data_ptr() != self.x.data_ptr():
            self.x.copy_(hidden)
        self.place.runs.add(run)
        self.layer_runs.add(run)
        self._forward()
        result = self.x.clone() if self._y is None else self._y.detach()
        self.flow.holds(result)
        return result

    def run_backward(self, hidden: torch.Tensor | None, arguments: tuple, run: "_Run", gradient: torch.Tensor) -> tuple:
        if not self.recompute and run not in self.layer_runs:
            raise RuntimeError(
                "Backward came a second time through a layer that is replayed as a CUDA graph and holds what backward "
                "needs once: set train.cuda_graphs=false, or train.gradient_checkpointing=full."
            )
        self.place.load(arguments)
        if hidden is not None:
            self.flow.hold(hidden)
        self.flow.hold_gradient(gradient)
        self._backward()
        self.place.runs.discard(run)
        self.layer_runs.discard(run)
        if self.graphs.lends_gradients and not self.layer_runs:
            # Tensors that nobody else holds: AccumulateGrad would copy others.
            gradients = [None if gradient is None else gradient.detach() for gradient in self._gradients]
        else:
            gradients = copies(self._gradients)
        return self.flow.gradient() if self._needs_input else None, *gradients


class _Call(nn.Module):
    """A call of ``layer``, whose parameters ``functional_call`` can replace."""

    def __init__(self, layer: nn.Module, call: Callable) -> None:
        super().__init__()
        self.layer, self.forward = layer, call


class _Run:
    """One forward pass of a layer: it is alive until its graph is dropped."""

    __slots__ = ("__weakref__",)


class _Replayed(torch.autograd.Function):
    """A layer's input to its result, both by graphs."""

    @staticmethod
    def forward(ctx: Any, hidden, recorded, arguments, *parameters):
        ctx.recorded, ctx.arguments, ctx.run = recorded, arguments, _Run()
        if recorded.recompute:
            ctx.save_for_backward(hidden)
        return recorded.run_forward(hidden, arguments, ctx.run)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        hidden = ctx.saved_tensors[0] if ctx.recorded.recompute else None
        grad_hidden, *gradients = ctx.recorded.run_backward(hidden, ctx.arguments, ctx.run, gradient)
        return grad_hidden, None, None, *gradients


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


def _random_offset(tensor: torch.Tensor) -> Any:
    """Changes when random numbers are drawn on the tensor's device. The host knows it."""
    if tensor.is_cuda:
        return torch.cuda.default_generators[tensor.device.index].get_offset()
    return torch.random.get_rng_state().numpy().tobytes()


def _tensors_of(arguments: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
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


def _with_tensors(arguments: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    """``arguments`` with others in the places of its tensors, in the order of ``_tensors_of``."""
    leaves, structure = tree_flatten(arguments)
    others = iter(tensors)

    def other(leaf: Any) -> Any:
        if isinstance(leaf, Documents):
            return Documents((), next(others), leaf.rounded().longest)
        return next(others) if isinstance(leaf, torch.Tensor) else leaf

    return tree_unflatten([other(leaf) for leaf in leaves], structure)
