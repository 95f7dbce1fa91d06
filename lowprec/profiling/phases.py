"""Where a step's time goes: data, forward, backward, optimizer; and in them, waits for a disk and for the device.

On CUDA the times are those of the device, between events in its stream of work: nothing waits for them, and what the
host does meanwhile does not count. Elsewhere work is done as it is called, and the host's clock tells.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lowprec.optim.traffic import Traffic
from lowprec.train.clock import Mark

PHASES = ("data", "forward", "backward", "optimizer", "other")
"""``data`` runs from the end of a step to the beginning of the next one's forward pass; ``optimizer`` has the clipping
and the update; ``other`` is what a foreign loop does between. Together they are the step."""


@dataclass
class _Step:
    """The marks of one step: a phase and when it began; ``end`` closes the last."""

    marks: list[tuple[str, Mark]] = field(default_factory=list)
    end: Mark | None = None
    disk_wait_s: float = 0.0


class Phases:
    """A probe, and what a loop tells where it stands: ``enter("forward")``, ..., ``leave()``.

    Args:
        device: where the work is done.
        traffic: of a state store on a disk; None where there is none.
    """

    def __init__(self, device: torch.device, traffic: Traffic | None = None) -> None:
        self.device, self.traffic = device, traffic
        self.listeners: list[Callable[[str], None]] = []
        """Called with the name of each phase as it begins, and with ``""`` as the step ends."""
        self.host_s = 0.0
        self._steps: deque[_Step] = deque()
        self._last_end: Mark | None = None
        self._disk_wait_s = self._unhidden_s()
        self._sync_s = 0.0

    def on_step_start(self) -> None:
        step = _Step()
        if self._last_end is not None:
            step.marks.append(("data", self._last_end))
        self._steps.append(step)

    def enter(self, phase: str) -> None:
        """The work called from here on belongs to ``phase``, until the next ``enter`` or ``leave``."""
        if not self._steps or self._steps[-1].end is not None:  # nobody measures this
            return
        began = time.perf_counter()
        self._steps[-1].marks.append((phase, Mark(self.device)))
        for listener in self.listeners:
            listener(phase)
        self.host_s += time.perf_counter() - began

    def leave(self, at: Mark | None = None) -> None:
        """The step's work has been called, up to the mark ``at`` (None: now). To say it twice is to say it once."""
        if not self._steps or self._steps[-1].end is not None:
            return
        began = time.perf_counter()
        step = self._steps[-1]
        step.end = self._last_end = at or Mark(self.device)
        unhidden = self._unhidden_s()
        step.disk_wait_s, self._disk_wait_s = unhidden - self._disk_wait_s, unhidden
        for listener in self.listeners:
            listener("")
        self.host_s += time.perf_counter() - began

    def begin(self, at: Mark | None = None) -> None:
        """Steps begin, or go on, at ``at`` (None: now): what came since the last one, an evaluation or a checkpoint,
        belongs to none."""
        self._last_end = at or Mark(self.device)
        self._disk_wait_s = self._unhidden_s()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The host waits here until the device is done with a step."""
        began = time.perf_counter()
        yield
        self._sync_s += time.perf_counter() - began

    def wait_for_oldest(self) -> None:
        """Return once the device is done with the oldest step that has not ended."""
        end = self._steps[0].end
        assert end is not None, "a step is waited for after leave()"
        with self.waiting():
            end.wait()

    def on_step_end(self) -> dict[str, float]:
        """``data_ms`` ... ``other_ms`` (zeros left out, except of the four that every step has); of them
        ``disk_wait_ms``, in which training stood still for the disk; and ``host_sync_ms``, in which the host waited for
        the device, which costs nothing while the device has work.
        """
        step = self._steps.popleft()
        assert step.end is not None, "a step ends after leave()"
        seconds = dict.fromkeys(PHASES, 0.0)
        ends = [mark for _, mark in step.marks[1:]] + [step.end]
        for (phase, begin), end in zip(step.marks, ends, strict=True):
            seconds[phase] += end.seconds_since(begin)
        if seconds["other"] == 0:
            del seconds["other"]
        seconds |= {"disk_wait": step.disk_wait_s, "host_sync": self._sync_s}
        self._sync_s = 0.0
        return {f"{name}_ms": round(value * 1000, 3) for name, value in seconds.items()}

    def _unhidden_s(self) -> float:
        return self.traffic.unhidden_s if self.traffic is not None else 0.0
