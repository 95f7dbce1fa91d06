"""Device memory by phase, from the allocator's own counters."""

from collections import deque

import torch

from lowprec.profiling.phases import Phases

GIB = 2**30


class PeakMemory:
    """A probe: ``peak_forward_gib``, ... of each step on CUDA; nothing elsewhere.

    The allocator counts as memory is asked for, in the order of the calls, so nothing waits for the device. Its peak is
    reset with every phase: ``allocated`` and ``reserved`` keep the largest, in bytes.
    """

    def __init__(self, phases: Phases) -> None:
        self.allocated = self.reserved = 0
        self._device = phases.device
        self._steps: deque[dict[str, float]] = deque()
        self._phase = ""
        if self._device.type == "cuda":
            phases.listeners.append(self._turn)

    def restart(self) -> None:
        """Forget all peaks so far, also the one that no phase has read yet."""
        self.allocated = self.reserved = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_step_start(self) -> None:
        self._steps.append({})

    def on_step_end(self) -> dict[str, float]:
        return self._steps.popleft()

    def _turn(self, phase: str) -> None:
        peak = torch.cuda.max_memory_allocated(self._device)
        self.allocated = max(self.allocated, peak)
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._steps and self._phase:
            name = f"peak_{self._phase}_gib"
            self._steps[-1][name] = max(self._steps[-1].get(name, 0.0), peak / GIB)
        self._phase = phase
