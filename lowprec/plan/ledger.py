"""From the events of a step to what its peak is made of."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lowprec.plan.allocator import rounded
from lowprec.plan.tape import KINDS, Event


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes at the moment when most is allocated."""

    allocated: int
    phase: str
    parts: dict[str, int]
    by_phase: dict[str, int] = field(default_factory=dict)
    """The most in each phase."""


def peak_of(events: Iterable[Event]) -> Peak:
    """Of a tape's events, as ``torch.cuda.max_memory_allocated`` counts: in blocks of 512 bytes."""
    alive = dict.fromkeys(KINDS, 0)
    total = highest = 0
    at, parts = "", dict(alive)
    by_phase: dict[str, int] = {}
    for phase, comes, _, nbytes, kind, *_ in events:
        size = rounded(nbytes)
        if comes:
            alive[kind] += size
            total += size
            if total > highest:
                highest, at, parts = total, phase, dict(alive)
        else:
            alive[kind] -= size
            total -= size
        if total > by_phase.get(phase, 0):
            by_phase[phase] = total
    return Peak(highest, at, parts, by_phase)
