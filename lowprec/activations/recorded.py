"""The graphs of one layer for one shape: recording them, and replaying them as one autograd function."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lowprec.activations.places import Place, copies, unowned
from lowprec.layers.decode_buffer import release_decode_buffers
from lowprec.machine.timing import capture_stream

if TYPE_CHECKING:
    from lowprec.activations.graphs import GraphedLayer

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

    def forget(self) -> None:
        """Take another pool from now on: graphs cannot join one whose graphs are all gone."""
        self._pool = None

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


class Recorded:
    """The two graphs of one layer for one shape."""

    def __init__(self, graphed: "GraphedLayer", call: Callable, hidden: torch.Tensor, place: Place) -> None:
        self.graphs, self.layer_runs, self.place, self.flow = graphed.graphs, graphed.runs, place, place.flow
        layer, recorder, flow = graphed.layer, graphed.graphs.recorder, place.flow
        self.recompute = recompute = graphed.graphs.recompute
        trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
        self.parameters = list(trained.values())
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
        aliases = {f"layer.{name}": parameter.detach().requires_grad_() for name, parameter in trained.items()}
        aliased = partial(functional_call, _Call(layer, call), aliases)

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
            wanted = [*([leaf] if self._needs_input else []), *aliases.values()]
            found = torch.autograd.grad(self._held[0], wanted, flow.g, retain_graph=not recompute, allow_unused=True)
            if self._needs_input:
                flow.g.copy_(found[0])
            return list(found[self._needs_input :])

        results: Left
        self._forward: Replay
        self._backward: Replay
        self._gradients: Left
        with torch.no_grad(), torch.autograd.set_multithreading_enabled(False):  # as training's backward
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

    def run_forward(self, hidden: torch.Tensor, arguments: tuple, run: "Run") -> torch.Tensor:
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

    def run_backward(self, hidden: torch.Tensor | None, arguments: tuple, run: "Run", gradient: torch.Tensor) -> tuple:
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
        lends = self.graphs.lends_gradient if not self.layer_runs else None
        lent = [lends is not None and lends(parameter) for parameter in self.parameters]
        gradients = copies([None if used else grad for grad, used in zip(self._gradients, lent, strict=True)])
        for i, grad in enumerate(self._gradients):
            if lent[i] and grad is not None:
                gradients[i] = grad.detach()  # a tensor that nobody else holds: AccumulateGrad would copy another
        return self.flow.gradient() if self._needs_input else None, *gradients


class _Call(nn.Module):
    """A call of ``layer``, whose parameters ``functional_call`` can replace."""

    def __init__(self, layer: nn.Module, call: Callable) -> None:
        super().__init__()
        self.layer, self.forward = layer, call


class Run:
    """One forward pass of a layer: it is alive until its graph is dropped."""

    __slots__ = ("__weakref__",)


class Replayed(torch.autograd.Function):
    """A layer's input to its result, both by graphs."""

    @staticmethod
    def forward(ctx: Any, hidden, recorded, arguments, *parameters):
        ctx.recorded, ctx.arguments, ctx.run = recorded, arguments, Run()
        if recorded.recompute:
            ctx.save_for_backward(hidden)
        return recorded.run_forward(hidden, arguments, ctx.run)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        hidden = ctx.saved_tensors[0] if ctx.recorded.recompute else None
        grad_hidden, *gradients = ctx.recorded.run_backward(hidden, ctx.arguments, ctx.run, gradient)
        return grad_hidden, None, None, *gradients
