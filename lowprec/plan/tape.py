"""What a traced step leaves: when storages came and went and what was computed, layer by layer; and the same for a
model of more layers.

A decoder repeats one layer, or a period of several, so a step of a model of a few layers (``Template``) says all about
one of any depth: its first and its last layers are played as they are, the period between as often as it takes. What
lies outside the layers is played once. A storage is found again as "number ``ordinal`` that this visit of that layer
allocated"; where the layers turn out not to be alike, ``Tape.stretched`` says so and the caller traces all of them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

ENDS = 2
"""Layers at the beginning, and at least as many at the end, that stand for themselves alone: the outermost meet what is
outside, and of the next ones some is fetched ahead."""

KINDS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace")
"""What holds device memory, in the order of reports; there ``slack`` and ``context`` follow."""


STILL = "model"
"""The phase before the step: what is there already."""


class Event(NamedTuple):
    """A storage comes or goes."""

    phase: str
    comes: bool
    storage: object
    """Its identity."""
    nbytes: int
    kind: str
    in_layer: bool
    """Whether it came in a layer."""
    run: int
    """Number of the ``Run`` in which this happens."""


class NotUniformError(Exception):
    """The layers of the trace are not alike, so that it cannot stand for a deeper model."""


@dataclass(frozen=True, slots=True)
class Product:
    """``count`` products ``[m, k] @ [k, n]`` of one call (several for a batched one)."""

    kind: str
    m: int
    n: int
    k: int
    count: int = 1


@dataclass(slots=True)
class Run:
    """Consecutive events of one phase in one layer (None: outside the layers)."""

    phase: str
    layer: int | None
    events: list[int] = field(default_factory=list)
    """``2 * storage`` where it comes, ``2 * storage + 1`` where it goes."""
    products: Counter[Product] = field(default_factory=Counter)
    moves: Counter[int] = field(default_factory=Counter)
    """Bytes read and written by one call -> calls, of all that is no product."""
    calls: int = 0
    """Kernels launched."""
    own_calls: int = 0
    """Of them, by lowprec's operators, which are dearer for the host."""


@dataclass(frozen=True, slots=True)
class Key:
    """A storage of the stretched step."""

    sweep: int
    layer: int | None
    ordinal: int


@dataclass(frozen=True, slots=True)
class Template:
    """Which layers of a model of ``depth`` are traced: the first ones, one period, and the last ones. Layers that are a
    multiple of ``period`` apart are alike."""

    depth: int
    period: int = 1

    @property
    def tail(self) -> int:
        """Layers at the end, so many that those between are a number of periods."""
        return ENDS + (self.depth - 2 * ENDS) % self.period

    @property
    def num_layers(self) -> int:
        """Layers that are traced."""
        return ENDS + self.period + self.tail

    @property
    def shifts(self) -> range:
        """How far from the traced period the periods are."""
        return range(0, self.depth - ENDS - self.tail, self.period)

    def repeats(self, traced: int | None) -> bool:
        """Whether a traced layer is of the period."""
        return traced is not None and ENDS <= traced < ENDS + self.period

    def layers_of(self, traced: int) -> list[int]:
        """The layers that a traced one stands for."""
        if self.repeats(traced):
            return [traced + shift for shift in self.shifts]
        return [traced if traced < ENDS else traced + self.depth - self.num_layers]

    def traced(self, layer: int) -> int:
        """The traced layer that stands for one."""
        if layer >= self.depth - self.tail:
            return layer - self.depth + self.num_layers
        return layer if layer < ENDS else ENDS + (layer - ENDS) % self.period


@dataclass(slots=True)
class Tape:
    """Storages have numbers of their own, by which ``sizes`` and ``kinds`` are found."""

    sizes: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    num_layers: int = 0

    def begin(self, phase: str, layer: int | None = None) -> None:
        self.runs.append(Run(phase, layer))

    def with_states(self, states: Sequence[tuple[int | None, int]]) -> "Tape":
        """This step with an optimizer's ``states`` (layer, bytes) there from the start, behind the weights of their
        layer and before its gradients. No operator of a step knows of them: one trace serves every optimizer."""
        tape = replace(self, sizes=[*self.sizes], kinds=[*self.kinds], runs=[*self.runs])
        places: dict[int | None, list[int]] = {}
        for layer, nbytes in states:
            places.setdefault(layer, []).append(2 * len(tape.sizes))
            tape.sizes.append(nbytes)
            tape.kinds.append("optimizer")
        for layer, comes in places.items():
            number, run = next((i, r) for i, r in enumerate(self.runs) if (r.phase, r.layer) == (STILL, layer))
            is_gradient = [self.kinds[event >> 1] == "gradients" for event in run.events]
            at = is_gradient.index(True) if any(is_gradient) else len(run.events)
            tape.runs[number] = replace(run, events=[*run.events[:at], *comes, *run.events[at:]])
        return tape

    def events(self) -> Iterator[Event]:
        """Every event in turn."""
        inside: set[int] = set()
        for number, run in enumerate(self.runs):
            for event in run.events:
                storage, comes = event >> 1, event & 1 == 0
                if comes and run.layer is not None:
                    inside.add(storage)
                size, kind = self.sizes[storage], self.kinds[storage]
                yield Event(run.phase, comes, storage, size, kind, storage in inside, number)

    def stretched(self, template: Template) -> "Stretched":
        """This step as the deep model takes it.

        Raises:
            NotUniformError: the layers are not alike.
        """
        return Stretched(self, template)


class Stretched:
    """``Tape`` for more layers; same interface."""

    def __init__(self, tape: Tape, template: Template):
        assert tape.num_layers == template.num_layers < template.depth
        self._tape, self._template = tape, template
        self._owner: dict[int, Key] = {}
        self._runs = _settled(tape)
        self._sizes: dict[tuple[int, int | None], list[int]] = {}
        self._goes: set[int] = set()
        for sweep, run in self._runs:
            place = self._sizes.setdefault((sweep, run.layer), [])
            for event in run.events:
                if event & 1 == 0:
                    self._owner[event >> 1] = Key(sweep, run.layer, len(place))
                    place.append(event >> 1)
                else:
                    self._goes.add(event >> 1)

    @property
    def runs(self) -> Iterator[Run]:
        for _, run, _ in self._played():
            yield run

    def events(self) -> Iterator[Event]:
        sizes, kinds = self._tape.sizes, self._tape.kinds
        alive: set[tuple[int, int | None, int]] = set()
        for number, (_, run, shift) in enumerate(self._played()):
            for event in run.events:
                storage, key = event >> 1, self._owner[event >> 1]
                layer = None if key.layer is None else key.layer + shift
                place = (key.sweep, layer, key.ordinal)
                if event & 1 == 0:
                    alive.add(place)
                elif place in alive:
                    self._check(key, layer, storage)
                    alive.remove(place)
                else:
                    continue  # what all layers share goes once
                yield Event(run.phase, event & 1 == 0, place, sizes[storage], kinds[storage], layer is not None, number)
        for sweep, layer, ordinal in alive:
            if self._at(sweep, layer)[ordinal] in self._goes:
                raise NotUniformError(f"something that layer {layer} allocates is never freed")

    def _at(self, sweep: int, layer: int | None) -> list[int]:
        return self._sizes.get((sweep, None if layer is None else self._template.traced(layer)), [])

    def _check(self, key: Key, layer: int | None, storage: int) -> None:
        """A storage that another layer's run frees must be what the template says it is."""
        if layer is None:
            return
        there = self._at(key.sweep, layer)
        if key.ordinal >= len(there) or self._tape.sizes[there[key.ordinal]] != self._tape.sizes[storage]:
            raise NotUniformError(f"layer {layer} allocates other things than layer {key.layer}")

    def _played(self) -> Iterator[tuple[int, Run, int]]:
        """(sweep, run, number of its layer minus the template's) in the order of the deeper model."""
        template, previous = self._template, -1
        for (sweep, repeats), group in groupby(self._runs, lambda entry: (entry[0], template.repeats(entry[1].layer))):
            runs = [run for _, run in group]
            if repeats:
                for shift in template.shifts if previous < ENDS else reversed(template.shifts):
                    yield from ((sweep, run, shift) for run in runs)
            else:
                for run in runs:
                    yield sweep, run, 0 if run.layer is None else template.layers_of(run.layer)[0] - run.layer
            previous = -1 if runs[-1].layer is None else runs[-1].layer


def _settled(tape: Tape) -> list[tuple[int, Run]]:
    """The runs, each with the number of the sweep over the layers that it belongs to.

    A run outside the layers in which storages of layers go (``zero_grad``) is cut into runs of those layers.
    """
    layer_of: dict[int, int | None] = {}
    cut: list[Run] = []
    for run in tape.runs:
        pieces = [run] if run.layer is not None else _cut(run, layer_of)
        for piece in pieces:
            cut.append(piece)
            layer_of.update({event >> 1: piece.layer for event in piece.events if event & 1 == 0})
    settled: list[tuple[int, Run]] = []
    sweep, step, previous = 0, 0, None
    for run in cut:
        if run.layer is None or previous is None or previous.layer is None or previous.phase != run.phase:
            sweep, step = sweep + 1, 0
        elif run.layer != previous.layer:
            direction = 1 if run.layer > previous.layer else -1
            if step and direction != step:
                sweep, direction = sweep + 1, 0
            step = direction
        else:  # the same layer goes on
            _append(settled[-1][1], run)
            continue
        settled.append((sweep, Run(run.phase, run.layer)))
        _append(settled[-1][1], run)
        previous = run
    return settled


def _append(run: Run, more: Run) -> None:
    run.events += more.events
    run.products += more.products
    run.moves += more.moves
    run.calls += more.calls
    run.own_calls += more.own_calls


def _cut(run: Run, layer_of: dict[int, int | None]) -> list[Run]:
    """What comes in a run outside the layers belongs to the layer of what goes next (a gradient and its successor)."""
    tagged: list[tuple[int, int | None]] = []
    new: dict[int, int | None] = {}
    layer: int | None = None
    for event in reversed(run.events):
        storage = event >> 1
        if event & 1:
            layer = layer_of.get(storage)
            if storage not in layer_of:
                new[storage] = None
        elif storage in new:
            layer = None
        tagged.append((event, layer))
    pieces = [Run(run.phase, None, [], run.products, run.moves, run.calls, run.own_calls)]
    for event, layer in reversed(tagged):
        if layer != pieces[-1].layer:
            pieces.append(Run(run.phase, layer))
        pieces[-1].events.append(event)
    return pieces
