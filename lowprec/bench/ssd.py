"""``lowprec bench ssd --path P``: what the disk gives to the ssd store's pattern of reads and writes, and the best
setting.

Every transfer is whole, aligned and past the page cache, as the store's are. ``mixed`` writes as many bytes as it
reads,
the writes following the reads at a distance: what an optimizer step does.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lowprec.optim.disk import GIB, Disk, HostMemory, bytes_of, direct_refusal, reserve
from lowprec.optim.path_lock import PREFIX, PathLock
from lowprec.optim.states_io import write_json
from lowprec.optim.stores import CHUNK_BYTES, TUNED_FILE, read_tuned
from lowprec.optim.stores import THREADS as STORE_THREADS

BLOCKS = tuple(mib << 20 for mib in (2, 8, 16))
THREADS = (2, 8, 16)
FINALISTS = 3  # settings whose sustained rates decide
LEAD = 64  # slots by which the mixed pattern's reads lead its writes


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
        )
        return table


class _Bench:
    """A file of random bytes, and the transfers on it."""

    def __init__(
        self, path: Path, nbytes: int, direct: bool, block: int = max(BLOCKS), threads: int = max(THREADS)
    ) -> None:
        """``block`` and ``threads``: the most that will be used."""
        self.nbytes, self._block = nbytes, block
        disk = Disk()
        remedy = "Free some space, or choose another path."
        (self.file,) = reserve(disk, [path / f"{PREFIX}bench.bin"], [nbytes], [direct], remedy)
        self._memory = HostMemory(threads * 2 * block, pin=False)
        self._memory.tensor.random_()
        contents = bytes_of(self._memory.tensor)
        self._buffers = [contents[i * block : (i + 1) * block] for i in range(2 * threads)]

    def fill(self) -> None:
        """Write the whole file once: a read of reserved blocks that were never written would not reach the disk."""
        block, buffers = self._block, self._buffers
        with ThreadPoolExecutor(8) as pool:
            slots = range(self.nbytes // block)
            list(pool.map(lambda i: self.file.write(buffers[i % len(buffers)], i * block), slots))

    def rate(self, mode: str, block: int, threads: int, seconds: float) -> float:
        """GB/s moved in ``seconds`` by ``threads`` readers, writers, or both."""
        slots = self.nbytes // block
        end = time.perf_counter() + seconds
        moved = [0] * (2 * threads)
        credit = threading.Semaphore(0)  # slots read and not yet written

        def work(worker: int, transfer: Callable[[memoryview, int], None], writer_of_mixed: bool, index: int) -> None:
            buffer = self._buffers[worker][:block]
            while time.perf_counter() < end:
                if writer_of_mixed and not credit.acquire(timeout=0.1):
                    continue
                transfer(buffer, index % slots * block)
                moved[worker] += block
                index += threads
                if mode == "mixed" and not writer_of_mixed:
                    credit.release()

        jobs: list[tuple[int, Callable[[memoryview, int], None], bool, int]] = []
        if mode in ("read", "mixed"):
            jobs += [(i, self.file.read, False, i) for i in range(threads)]
        if mode == "write":
            jobs += [(i, self.file.write, False, i) for i in range(threads)]
        if mode == "mixed":
            jobs += [(threads + i, self.file.write, True, i + slots - LEAD % slots) for i in range(threads)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(lambda job: work(*job), jobs))
        elapsed = time.perf_counter() - begin
        total = sum(moved) if mode != "mixed" else 2 * min(sum(moved[:threads]), sum(moved[threads:]))
        return total / elapsed / 1e9


def quick(path: str | Path, seconds: float = 6.0, size_gib: float = 1.0) -> tuple[Rate, bool]:
    """Read, write and mixed rates of the setting that a store on ``path`` would use, and whether O_DIRECT was taken.

    Nothing is kept. Raises UserError where the space is missing or a run holds the path.
    """
    path = Path(path)
    tuned = read_tuned(path)
    block, threads = tuned.get("chunk_bytes", CHUNK_BYTES), min(tuned.get("threads", STORE_THREADS), max(THREADS))
    lock = PathLock(path)
    try:
        direct = direct_refusal(Disk(), path) is None
        bench = _Bench(path, int(size_gib * GIB) // block * block, direct, block, threads)
        try:
            bench.fill()
            rates = [bench.rate(mode, block, threads, seconds / 3) for mode in ("read", "write", "mixed")]
        finally:
            bench.file.remove()
        return Rate(block / 2**20, threads, *rates), direct
    finally:
        lock.release()


def run(path: str | Path, seconds: float = 45.0, size_gib: float = 2.0) -> SsdReport:
    """Measure the disk under ``path`` for about ``seconds``, with a file of ``size_gib`` that is removed afterwards.

    The best block and threads are kept in ``path`` and used by every ssd store there. Raises UserError where the
    space is missing or a run holds the path.
    """
    path = Path(path)
    lock = PathLock(path)
    try:
        direct = direct_refusal(Disk(), path) is None
        bench = _Bench(path, int(size_gib * GIB) // max(BLOCKS) * max(BLOCKS), direct)
        try:
            bench.fill()
            each = seconds * 0.55 / (len(BLOCKS) * len(THREADS) * 3)
            rates = [
                Rate(
                    block / 2**20,
                    threads,
                    *(bench.rate(mode, block, threads, each) for mode in ("read", "write", "mixed")),
                )
                for block in BLOCKS
                for threads in THREADS
            ]
            # The best of many short measurements is the luckiest as a rule: the first few are held against each other.
            finalists = sorted(rates, key=lambda rate: rate.mixed_gb_s, reverse=True)[:FINALISTS]
            sustained_s = seconds * 0.4 / FINALISTS
            sustained = {
                rate: bench.rate("mixed", int(rate.block_mib * 2**20), rate.threads, sustained_s) for rate in finalists
            }
            best = max(finalists, key=lambda rate: sustained[rate])
        finally:
            bench.file.remove()
        write_json(path / TUNED_FILE, {"chunk_bytes": int(best.block_mib * 2**20), "threads": best.threads})
        return SsdReport(str(path), direct, rates, best, sustained[best], sustained_s)
    finally:
        lock.release()
