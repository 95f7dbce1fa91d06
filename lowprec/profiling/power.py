"""Energy of steps."""

import torch

from lowprec.machine.energy import EnergyMeter


class Power:
    """A probe: ``energy_j`` of each step, by NVML's counter or an estimate (``meter.note`` says which).

    The counter moves every few tens of milliseconds, so single steps are coarse; their sum is right.
    """

    def __init__(self, device: torch.device) -> None:
        self.meter = EnergyMeter([device])
        self._before = self.meter.read().joules

    def on_step_start(self) -> None:
        pass

    def on_step_end(self) -> dict[str, float]:
        now, before = self.meter.read().joules, self._before
        self._before = now
        return {} if now is None or before is None else {"energy_j": now - before}
