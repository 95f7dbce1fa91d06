"""Which tensors are alive, how large, of what kind and in which module: every storage of a device is followed from the
operator that made it to its end.

Kinds: ``weights``, ``adapters``, ``gradients`` and ``optimizer`` by what holds the storage; ``logits``: whatever ends
in the vocabulary's size; ``activations``: what a forward pass leaves for backward, recomputed ones too; ``workspace``:
all that is gone when the pass that made it is over (temporaries, gradients of activations). What a storage is, is often
known only later, so kinds are settled when the step is over.

On CUDA the allocator is asked beside it, operator by operator: what it holds above the sum of the storages (memory that
kernels took inside an operator, rounding) is ``workspace`` too, so that the kinds add up to what is allocated.

This looks at each operator from Python and makes a step many times slower: it is for one step that is not timed.
``lowprec.plan.tracker`` does the like for traced steps without data.
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lowprec.plan.follow import all_tensors, is_adapter
from lowprec.plan.tape import KINDS
from lowprec.profiling.modules import ModuleStack, collapsed, plain_name


@dataclass(slots=True, eq=False)
class Span:
    """A pass: forward, backward, or forward recomputed in it. Operators from ``begin`` to before ``end``."""

    is_forward: bool
    end: int | None = None


@dataclass(slots=True, eq=False)
class Storage:
    """One storage. ``begin`` and ``end`` count operators; ``end`` is None while it is alive."""

    nbytes: int
    begin: int
    phase: str
    module: str
    span: Span
    kind: str | None = None
    end: int | None = None


@dataclass(slots=True)
class Moment:
    """The device at one operator, in bytes. ``peak``: the most while it ran."""

    phase: str
    module: str
    operator: str
    peak: int


class Alive(TorchDispatchMode):
    """Follow storages while it is entered.

    Args:
        device: whose storages; those of other devices are not followed.
        model: whose parameters, buffers and modules give kinds and names.
        optimizer: whose states are told from the rest.
        limit: raise ``torch.OutOfMemoryError`` in the operator that would hold more bytes than this.
    """

    def __init__(
        self,
        device: torch.device,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.device, self.model, self.optimizer, self.limit = device, model, optimizer, limit
        self.storages: list[Storage] = []
        self.moments: list[Moment] = []
        self.failed_at: int | None = None
        """The operator in which memory ran out, if it did."""
        self._modules = ModuleStack(model)
        config = getattr(model, "config", None)
        self._vocab_size = getattr(config, "vocab_size", None)
        self._of: dict[int, Storage] = {}
        self._watched: dict[int, weakref.ref] = {}
        self._held = 0
        self._phase = ""
        self._span = Span(is_forward=False)
        self._hooks: list[Any] = []

    def enter_phase(self, phase: str) -> None:
        """A listener of ``Phases``: what is made from here on belongs to it."""
        self._phase = phase
        self._modules.restart()
        self._turn(is_forward=phase == "forward")

    def __enter__(self) -> "Alive":
        if self.model is not None:
            for name, tensor in all_tensors(self.model):
                record = self._follow(tensor)
                if record is not None:
                    record.kind = "adapters" if is_adapter(name) else "weights"
                    record.module = plain_name(name.rpartition(".")[0])
            self._hooks = self._modules.attach(self._turn) + self._watch_gradients(self.model)
        self._register_states()
        self._note("", "begin")
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for hook in self._hooks:
            hook.remove()
        self._register_states()
        self._turn(is_forward=False)
        for storage in self.storages:
            storage.kind = storage.kind or _settled(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            result = func(*args, **(kwargs or {}))
        except torch.OutOfMemoryError:
            self._fail(str(func))
            raise
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                record = self._follow(value)
                if record is not None and record.kind is None and value.ndim and value.shape[-1] == self._vocab_size:
                    record.kind = "logits"
        self._note(self._modules.current, str(func))
        if self.limit is not None and self._held > self.limit:
            self._fail(str(func))
            raise torch.OutOfMemoryError(
                f"{self._held:,} bytes of {self.device.type} memory would be held, and the limit is {self.limit:,}."
            )
        return result

    def _note(self, module: str, operator: str) -> None:
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self._held
        self.moments.append(Moment(self._phase, module, operator, peak))

    def _fail(self, operator: str) -> None:
        if self.failed_at is None:
            self._note(self._modules.current, operator)
            self.failed_at = len(self.moments) - 1
            self._turn(is_forward=False)  # what the pass had made is what it would have kept
            self._note("", "the end")

    def _follow(self, tensor: torch.Tensor) -> Storage | None:
        if tensor.device.type != self.device.type:
            return None
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a subclass or layout without a storage of its own
            return None
        key = storage._cdata
        known = self._of.get(key)
        if known is not None or not storage.nbytes():
            return known
        record = Storage(storage.nbytes(), len(self.moments), self._phase, self._modules.current, self._span)
        self._of[key] = record
        self.storages.append(record)
        self._held += record.nbytes
        self._watched[key] = weakref.ref(storage, lambda _: self._end(key))
        return record

    def _end(self, key: int) -> None:
        record = self._of.pop(key)
        del self._watched[key]
        record.end = len(self.moments)
        self._held -= record.nbytes

    def _turn(self, is_forward: bool) -> None:
        self._span.end = len(self.moments)
        self._span = Span(is_forward)

    def _register_states(self) -> None:
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        for tensor in tree_iter([list(state.values()) for state in states]):
            record = self._follow(tensor) if isinstance(tensor, torch.Tensor) else None
            if record is not None:
                record.kind, record.module = "optimizer", ""

    def _watch_gradients(self, model: nn.Module) -> list[Any]:
        """A gradient is known when it is computed, and again when it was added up: that may be another storage."""

        def computed(gradient: torch.Tensor) -> None:
            self._mark_gradient(gradient)

        def accumulated(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:  # an optimizer that updates in backward has freed it
                self._mark_gradient(parameter.grad)

        hooks: list[Any] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                hooks += [
                    parameter.register_hook(computed),
                    parameter.register_post_accumulate_grad_hook(accumulated),
                ]
        return hooks

    def _mark_gradient(self, gradient: torch.Tensor) -> None:
        record = self._follow(gradient)
        if record is not None:
            record.kind = "gradients"


def _settled(storage: Storage) -> str:
    """The kind of a storage that nothing has claimed."""
    if storage.phase == "optimizer":
        return "workspace"
    span_end = storage.span.end
    outlives = storage.end is None or (span_end is not None and storage.end > span_end)
    return "activations" if storage.span.is_forward and outlives else "workspace"


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bytes by kind, operator by operator, of what an ``Alive`` has followed."""

    alive: Alive
    by_kind: dict[str, np.ndarray]
    """int64 ``[operators]`` for each kind; they add up to ``peak``."""
    peak: np.ndarray
    """int64 ``[operators]``."""

    @classmethod
    def of(cls, alive: Alive) -> "Timeline":
        count = len(alive.moments)
        changes = {kind: np.zeros(count + 1, dtype=np.int64) for kind in KINDS}
        for storage in alive.storages:
            assert storage.kind is not None, "kinds are settled when following ends"
            changes[storage.kind][min(storage.begin, count)] += storage.nbytes
            if storage.end is not None:
                changes[storage.kind][min(storage.end, count)] -= storage.nbytes
        by_kind = {kind: change.cumsum()[:count] for kind, change in changes.items()}
        peak = np.array([moment.peak for moment in alive.moments], dtype=np.int64)
        by_kind["workspace"] = by_kind["workspace"] + np.maximum(peak - sum(by_kind.values()), 0)
        return cls(alive, by_kind, np.maximum(peak, sum(by_kind.values())))

    @property
    def at(self) -> int:
        """The operator at the peak; where memory ran out, that one."""
        failed = self.alive.failed_at
        return int(self.peak.argmax()) if failed is None else failed

    def parts(self) -> dict[str, int]:
        """Bytes of each kind at the peak."""
        return {kind: int(series[self.at]) for kind, series in self.by_kind.items()}

    def modules(self, most: int = 12) -> list[tuple[str, str, int, int]]:
        """(module, kind, bytes, storages) at the peak, the largest first, layers of one kind together."""
        sizes: Counter[tuple[str, str]] = Counter()
        counts: Counter[tuple[str, str]] = Counter()
        for storage in self.alive.storages:
            if storage.begin <= self.at and (storage.end is None or storage.end > self.at):
                place = collapsed(storage.module), str(storage.kind)
                sizes[place] += storage.nbytes
                counts[place] += 1
        return [(module, kind, size, counts[module, kind]) for (module, kind), size in sizes.most_common(most)]

    def points(self, most: int = 300) -> list[int]:
        """Operators to draw: of each stretch the one that holds most, so that no peak is lost."""
        edges = np.unique(np.linspace(0, len(self.peak), min(most, len(self.peak)) + 1).astype(int))
        return [int(a + self.peak[a:b].argmax()) for a, b in zip(edges[:-1], edges[1:], strict=True)]
