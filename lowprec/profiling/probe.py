"""The contract of a probe, and the probes of a loop, which know what they cost."""

import time
from collections.abc import Sequence
from typing import Protocol


class Probe(Protocol):
    """One family of figures. The suffix of a figure's name is its unit: ``_ms``, ``_gib``, ``_j``."""

    def on_step_start(self) -> None:
        """A step begins; earlier ones may still be under way on the device."""
        ...

    def on_step_end(self) -> dict[str, float]:
        """The figures of the oldest step that has not ended, all of whose work is done. Never waits for the device."""
        ...


class Probes:
    """The probes of a loop as one. ``host_s`` is the time that they took of the host, which bounds their cost."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = list(probes)
        self._host_s = 0.0

    def on_step_start(self) -> None:
        began = time.perf_counter()
        for probe in self.probes:
            probe.on_step_start()
        self._host_s += time.perf_counter() - began

    def on_step_end(self) -> dict[str, float]:
        began = time.perf_counter()
        figures = {name: value for probe in self.probes for name, value in probe.on_step_end().items()}
        self._host_s += time.perf_counter() - began
        return figures

    @property
    def host_s(self) -> float:
        """Seconds of the host in all probes so far, marks between phases included."""
        return self._host_s + sum(getattr(probe, "host_s", 0.0) for probe in self.probes)
