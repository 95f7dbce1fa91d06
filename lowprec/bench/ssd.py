"""``lowprec bench ssd --path P``: what the disk gives to the ssd store's pattern of reads and writes, and the best
setting.

Every transfer is whole, aligned and past the page cache, as the store's are. ``mixed`` writes as many bytes as it
reads, the writes following the reads at a distance: what an optimizer step does.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lowprec.bench.raw_disk import RawFile, store_setting
from lowprec.optim.path_lock import PathLock
from lowprec.optim.states_io import write_json
from lowprec.optim.stores import THREADS as STORE_THREADS
from lowprec.optim.stores import TUNED_FILE

BLOCKS = tuple(mib << 20 for mib in (2, 8, 16))
THREADS = (2, 8, 16)
FINALISTS = 3  # settings whose sustained rates decide


@dataclass(frozen=True)
class Rate:
    """One measured setting; rates in GB/s (1e9 bytes a second)."""

    block_mib: float
    threads: int
    read_gb_s: float
    write_gb_s: float
    mixed_gb_s: float


@dataclass(frozen=True)
class SsdReport:
    """All settings, and the sustained mixed rate of the best one, which is kept for runs on this path."""

    path: str
    direct: bool
    settled: bool
    """Whether the disk gave the same rate for a while before it was measured."""
    rates: list[Rate]
    best: Rate
    sustained_mixed_gb_s: float
    sustained_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        table = Table(title=f"{self.path}, {'O_DIRECT' if self.direct else 'through the page cache'}, GB/s")
        for column in ("block MiB", "threads", "read", "write", "mixed, read + written"):
            table.add_column(column, justify="right")
        for rate in self.rates:
            values = (f"{value:.2f}" for value in (rate.read_gb_s, rate.write_gb_s, rate.mixed_gb_s))
            mark = " *" if rate == self.best else ""
            table.add_row(f"{rate.block_mib:g}", f"{rate.threads}{mark}", *values)
        table.caption = (
            f"* kept for this path; sustained for {self.sustained_s:.0f} s: {self.sustained_mixed_gb_s:.2f} GB/s mixed"
            + ("" if self.settled else "; the disk never settled: the rates are uncertain")
        )
        return table


def quick(path: str | Path, seconds: float = 6.0, size_gib: float = 1.0) -> tuple[Rate, bool]:
    """Read, write and mixed rates of the setting that a store on ``path`` would use, and whether O_DIRECT was taken.

    Nothing is kept. Raises UserError where the space is missing or a run holds the path.
    """
    path = Path(path)
    block, threads = store_setting(path)
    with PathLock(path), RawFile(path, size_gib, block, threads) as file:
        rates = [file.rate(mode, block, threads, seconds / 3) for mode in ("read", "write", "mixed")]
        return Rate(block / 2**20, threads, *rates), file.direct


def run(path: str | Path, seconds: float = 45.0, size_gib: float = 2.0) -> SsdReport:
    """Measure the disk under ``path`` for about ``seconds``, with a file of ``size_gib`` that is removed afterwards.

    The best block and threads are kept in ``path`` and used by every ssd store there. Before, the disk may settle, for
    two thirds of ``seconds`` at most. Raises UserError where the space is missing or a run holds the path.
    """
    path = Path(path)
    with PathLock(path):
        with RawFile(path, size_gib, max(BLOCKS), max(THREADS)) as file:
            settling = file.settle(max(BLOCKS), STORE_THREADS, seconds / 45)
            each = seconds * 0.55 / (len(BLOCKS) * len(THREADS) * 3)
            rates = [
                Rate(
                    block / 2**20,
                    threads,
                    *(file.rate(mode, block, threads, each) for mode in ("read", "write", "mixed")),
                )
                for block in BLOCKS
                for threads in THREADS
            ]
            # The best of many short measurements is the luckiest as a rule: the first few are held against each other.
            finalists = sorted(rates, key=lambda rate: rate.mixed_gb_s, reverse=True)[:FINALISTS]
            sustained_s = seconds * 0.4 / FINALISTS
            sustained = {
                rate: file.rate("mixed", int(rate.block_mib * 2**20), rate.threads, sustained_s) for rate in finalists
            }
            best = max(finalists, key=lambda rate: sustained[rate])
        write_json(path / TUNED_FILE, {"chunk_bytes": int(best.block_mib * 2**20), "threads": best.threads})
        return SsdReport(str(path), file.direct, settling.settled, rates, best, sustained[best], sustained_s)
