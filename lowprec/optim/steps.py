"""How many updates each parameter has had, counted where it is updated, so that a skipped step needs no host."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lowprec.optim.layout import Chunk
from lowprec.optim.update import Hyper, Steps


class StepCounts:
    """One fp32 vector of counts for each device; entry i belongs to parameter i."""

    def __init__(self, devices: dict[int, torch.device]):
        self._devices = devices  # of the parameters that have states
        self._length = max(devices, default=-1) + 1
        self._counts = {device: torch.zeros(self._length, device=device) for device in dict.fromkeys(devices.values())}
        self._masks: dict[torch.device, tuple[frozenset[int], Tensor]] = {}

    def of(self, parameter: int) -> Tensor:
        """The count of one parameter: a 0-dim view."""
        return self._counts[self._devices[parameter]][parameter]

    def set(self, counts: dict[int, float]) -> None:
        for parameter, count in counts.items():
            self.of(parameter).fill_(count)

    def next(self) -> dict[torch.device, Tensor]:
        """The counts with one step more."""
        return {device: counts + 1 for device, counts in self._counts.items()}

    def advance(self, updated: Iterable[int], found_inf: Tensor | None) -> None:
        """Count a step of the ``updated`` parameters, unless ``found_inf`` is not zero on the device."""
        updated = frozenset(updated)
        for device, counts in self._counts.items():
            if self._masks.get(device, (None,))[0] != updated:  # the same parameters as a rule: copied once
                mask = torch.tensor([float(i in updated) for i in range(self._length)], device=device)
                self._masks[device] = updated, mask
            mask = self._masks[device][1]
            counts += mask if found_inf is None else mask * (found_inf.to(device).reshape(()) == 0)


class Round:
    """One step under way: its counts and settings, what it has updated and which chunks it has finished, in order."""

    def __init__(self, counts: dict[torch.device, Tensor], groups: Sequence[dict]):
        self.updated: set[int] = set()
        self.finished: dict[int, Chunk] = {}
        self._counts = counts
        self._hypers = [Hyper.of(group) for group in groups]
        self._steps: dict[tuple[int, torch.device], Steps] = {}

    def steps(self, group: int, device: torch.device) -> Steps:
        key = group, device
        if key not in self._steps:
            self._steps[key] = Steps(self._counts[device], self._hypers[group])
        return self._steps[key]
