"""How many updates each parameter has had, counted where it is updated, so that a skipped step needs no host."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowprec.optim.layout import Chunk


@dataclass(frozen=True)
class Hyper:
    """The settings of one parameter group for one step."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool

    @classmethod
    def of(cls, group: dict) -> "Hyper":
        beta1, beta2 = group["betas"]
        rest = {name: group[name] for name in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
        return cls(beta1=beta1, beta2=beta2, **rest)


class Steps:
    """What the updates of one group on one device share in the step under way: its settings and step counts.

    ``begin`` writes the counts of a new step over those of the last, so that the views of each parameter are made once:
    ``counts[i]``, ``firsts[i]`` and ``seconds[i]``, fp32 and 0-dim, are parameter i's count, this step included, and
    after ``correct`` its ``1 - b1^t`` and ``sqrt(1 - b2^t)``.
    """

    hyper: Hyper

    def __init__(self, length: int, device: torch.device):
        self.device = device
        self._rows = torch.zeros(3, length, device=device)
        self.counts, self.firsts, self.seconds = (row.unbind() for row in self._rows)

    def begin(self, counts: Tensor, group: dict) -> None:
        """A step of ``group`` after the ``counts`` (fp32, one for each parameter) before it."""
        self.hyper = Hyper.of(group)
        torch.add(counts, 1, out=self._rows[0])
        self._is_corrected = False

    def correct(self) -> None:
        """Make the corrections once a step; in fp64 first, where 1 - 0.999 keeps its digits."""
        if not self._is_corrected:
            counts = self._rows[0].double()
            self._rows[1] = 1 - torch.pow(self.hyper.beta1, counts)
            self._rows[2] = (1 - torch.pow(self.hyper.beta2, counts)).sqrt()
            self._is_corrected = True


class StepCounts:
    """One fp32 vector of counts for each device; entry i belongs to parameter i.

    Args:
        devices: where each parameter that has states is updated.
        groups: the number of each parameter's group.
    """

    def __init__(self, devices: Mapping[int, torch.device], groups: Sequence[int]):
        self._places = {i: (groups[i], device) for i, device in devices.items()}
        self._length = max(devices, default=-1) + 1
        self._counts = {device: torch.zeros(self._length, device=device) for device in dict.fromkeys(devices.values())}
        self._steps = {place: Steps(self._length, place[1]) for place in dict.fromkeys(self._places.values())}
        self._masks: dict[torch.device, tuple[frozenset[int], Tensor]] = {}

    def of(self, parameter: int) -> Tensor:
        """The count of one parameter: a 0-dim view."""
        return self._counts[self._places[parameter][1]][parameter]

    def set(self, counts: dict[int, float]) -> None:
        for parameter, count in counts.items():
            self.of(parameter).fill_(count)

    def begin(self, groups: Sequence[dict]) -> None:
        """Begin a step with the settings of ``groups``."""
        for (group, device), steps in self._steps.items():
            steps.begin(self._counts[device], groups[group])

    def steps(self, parameter: int) -> Steps:
        """What the update of one parameter reads; the same object in every step."""
        return self._steps[self._places[parameter]]

    def advance(self, updated: Iterable[int], found_inf: Tensor | None) -> None:
        """Count a step of the ``updated`` parameters, unless ``found_inf`` is not zero on the device."""
        updated = frozenset(updated)
        for device, counts in self._counts.items():
            if self._masks.get(device, (None,))[0] != updated:  # the same parameters as a rule: copied once
                mask = torch.tensor([float(i in updated) for i in range(self._length)], device=device)
                self._masks[device] = updated, mask
            mask = self._masks[device][1]
            counts += mask if found_inf is None else mask * (found_inf.to(device).reshape(()) == 0)


@dataclass
class Round:
    """One step under way: what it has updated and which chunks it has finished, in order."""

    updated: set[int] = field(default_factory=set)
    finished: dict[int, Chunk] = field(default_factory=dict)
