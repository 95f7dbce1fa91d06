"""How the disk alone is measured right before and right after a work, whose steps are held against it."""

from dataclasses import dataclass
from typing import Any

from lowprec.bench.raw_disk import AGREE, MOST_PROBES, RawFile


@dataclass(frozen=True)
class RawMeasurement:
    """Reads and writes at once, as many bytes of each, as a step makes them, by a store's blocks and threads."""

    seconds: float = 8.0
    """Long enough to be sustained; a probe that shows whether the disk has settled takes an eighth."""
    file_gib: float = 4.0

    @property
    def _probe_s(self) -> float:
        return self.seconds / 8

    @property
    def least_s(self) -> float:
        """Seconds of one measurement where the disk has settled already."""
        return AGREE * self._probe_s + self.seconds

    def take(self, file: RawFile, block: int, threads: int, left: float | None) -> dict[str, Any]:
        """The rate once the disk has settled, and the probes before it. ``left``: seconds that it may all take."""
        most = MOST_PROBES if left is None else int((left - self.seconds) / self._probe_s)
        settling = file.settle(block, threads, self._probe_s, min(max(most, AGREE), MOST_PROBES))
        rate = file.rate("mixed", block, threads, self.seconds)
        probes = [round(probe, 3) for probe in settling.probes_gb_s]
        return {"mixed_gb_s": rate, "settled": settling.settled, "probes_gb_s": probes}
