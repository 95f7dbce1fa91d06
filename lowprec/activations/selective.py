"""``selective``: a layer is computed again but for the results that are dear to compute and cheap to hold.

The first time a layer runs it is taken twice more, on the same input and random state, and every operation in it is
timed. Those with the most time a byte of result are kept, until what is kept of a layer is as large as
``KEPT_INPUTS`` of its inputs. Results that are views, or random, or that somebody overwrites later in the layer, are
computed again.
"""

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT_INPUTS = 4
"""Bytes kept of a layer, beside its input, in units of its input."""

Key = tuple[str, int]
"""An operation's name, and which of its calls in the layer."""


@dataclass(slots=True)
class Cost:
    """One operation of a layer."""

    key: Key
    seconds: float
    bytes: int


class Selective:
    """A checkpoint function for ``keep_activations``."""

    def __init__(self, kept_inputs: float = KEPT_INPUTS) -> None:
        self.kept_inputs = kept_inputs
        self.kept: list[Cost] | None = None
        """None until a layer was measured."""
        self._keys: frozenset[Key] = frozenset()

    def __call__(self, function: Any, *args: Any) -> Any:
        if self.kept is None and torch.is_grad_enabled():
            budget = self.kept_inputs * sum(arg.nbytes for arg in args if isinstance(arg, torch.Tensor))
            self.kept = choose(measure(function, args), budget)
            self._keys = frozenset(cost.key for cost in self.kept)
        return checkpoint(function, *args, use_reentrant=False, context_fn=self._contexts)

    def describe(self) -> list[dict[str, Any]]:
        """Each operation whose result is kept, with the time it takes and the bytes it holds in one layer."""
        return [
            {"operation": f"{cost.key[0]} #{cost.key[1]}", "us": round(1e6 * cost.seconds, 1), "bytes": cost.bytes}
            for cost in self.kept or []
        ]

    def _contexts(self) -> Any:
        calls: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}

        def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            count = calls[context.is_recompute]
            name = str(operation)
            keep = (name, count[name]) in self._keys
            count[name] += 1
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)


def choose(costs: list[Cost], budget_bytes: float) -> list[Cost]:
    """The dearest a byte first, as many as fit."""
    kept, held = [], 0
    for cost in sorted(costs, key=lambda cost: cost.seconds / cost.bytes, reverse=True):
        if held + cost.bytes <= budget_bytes:
            kept.append(cost)
            held += cost.bytes
    return kept


def measure(function: Any, args: tuple[Any, ...]) -> list[Cost]:
    """What each operation of ``function(*args)`` costs whose result could be kept. Waits for the device."""
    device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), torch.device("cpu"))
    run = partial(_run, function, args, device)
    run(_Watch(device))  # the first run compiles kernels and warms up
    watch = _Watch(device)
    run(watch)
    return watch.costs()


def _run(function: Any, args: tuple[Any, ...], device: torch.device, watch: "_Watch") -> None:
    # Fresh leaves, so that the graph of the trial ends here.
    leaves = [arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad(), watch:
        function(*leaves)


class _Watch(TorchDispatchMode):
    """Times operations, and remembers their results until the layer is done, to see which were overwritten."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._calls: Counter[str] = Counter()
        self._seen: list[tuple[Key, Any, Any, list[torch.Tensor], list[torch.Tensor], list[int]]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        begin = self._mark()
        result = operation(*args, **kwargs)
        end = self._mark()
        name = str(operation)
        key = (name, self._calls[name])
        self._calls[name] += 1
        tensors = [t for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        if _may_be_kept(operation, args, kwargs, tensors):
            copies = [t.detach().clone() for t in tensors]
            self._seen.append((key, begin, end, tensors, copies, [t._version for t in tensors]))
        return result

    def costs(self) -> list[Cost]:
        """Of the operations whose results were still what they had been when the layer ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        costs = []
        for key, begin, end, tensors, copies, versions in self._seen:
            # Kernels that write through pointers change no version.
            same = all(torch.equal(t, c) and t._version == v for t, c, v in zip(tensors, copies, versions, strict=True))
            if same:
                costs.append(Cost(key, self._seconds(begin, end), sum(t.nbytes for t in tensors)))
        self._seen.clear()
        return costs

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - begin


def _may_be_kept(operation: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> bool:
    inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    if not inputs or not sum(t.nbytes for t in tensors) or operation._schema.is_mutable:
        return False
    storages = {t.untyped_storage().data_ptr() for t in inputs}
    if any(t.untyped_storage().data_ptr() in storages for t in tensors):
        return False
    if torch.Tag.nondeterministic_seeded in operation.tags:
        # What is skipped draws no random numbers, and all later ones would be others. Attention without dropout draws
        # none.
        return _argument(operation, args, kwargs, "dropout_p") == 0
    return True


def _argument(operation: Any, args: Any, kwargs: Any, name: str) -> Any:
    for index, argument in enumerate(operation._schema.arguments):
        if argument.name == name:
            return args[index] if index < len(args) else kwargs.get(name, argument.default_value)
    return None
