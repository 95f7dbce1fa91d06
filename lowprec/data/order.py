"""Which rows each optimizer step takes, and the position in that order from which a run goes on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lowprec.data.rows import Rows

State = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Step:
    """The rows ``chosen`` of ``rows``; ``state`` and ``epoch`` are those after the step."""

    rows: Rows
    chosen: np.ndarray
    state: State
    epoch: float


class Order(Protocol):
    """An endless order of steps. A state is JSON-able and does not depend on how steps are divided."""

    def first_state(self) -> State: ...

    def steps(self, state: State, step_rows: int) -> Iterator[Step]:
        """Steps of ``step_rows`` rows from ``state`` on; the last of an epoch may have fewer."""
        ...


ORDER = 2
"""Of permutations: a position means nothing in those of another number."""


class EpochOrder:
    """Every epoch is a permutation of all rows, drawn from the seed and the epoch's number. ``fingerprint`` tells these
    rows."""

    def __init__(self, rows: Rows, seed: int, fingerprint: str) -> None:
        self.rows = rows
        self.seed = seed
        self.fingerprint = fingerprint

    def first_state(self) -> State:
        return {"epoch": 0, "position": 0, "seed": self.seed, "data": self.fingerprint, "order": ORDER}

    def permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def steps(self, state: State, step_rows: int) -> Iterator[Step]:
        epoch, position = state["epoch"], state["position"]
        while True:
            permutation = self.permutation(epoch)
            while position < len(permutation):
                chosen = permutation[position : position + step_rows]
                position += len(chosen)
                after = {**state, "epoch": epoch, "position": position}
                yield Step(rows=self.rows, chosen=chosen, state=after, epoch=epoch + position / len(permutation))
            epoch, position = epoch + 1, 0
