"""A file laid out as the ssd store's are, and what the disk under it gives, sustained and undisturbed."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lowprec.optim.disk import GIB, Disk, HostMemory, bytes_of, direct_refusal, reserve
from lowprec.optim.path_lock import PREFIX
from lowprec.optim.stores import CHUNK_BYTES, THREADS, read_tuned

LEAD = 64  # slots by which the mixed pattern's reads lead its writes
AGREE, SPREAD = 3, 0.10  # a disk has settled when so many probes in succession lie so close together
MOST_PROBES = 30


@dataclass(frozen=True)
class Settling:
    """Mixed rates of short probes, GB/s, taken until they agreed or until there were enough."""

    probes_gb_s: list[float]

    @property
    def settled(self) -> bool:
        last = self.probes_gb_s[-AGREE:]
        return len(last) == AGREE and 0 < max(last) <= (1 + SPREAD) * min(last)


class RawFile:
    """A file of random bytes, and the transfers on it."""

    def __init__(self, folder: Path, size_gib: float, block: int, threads: int) -> None:
        """Reserve the file and write all of it once: reads of blocks that were never written would not reach the disk.

        Call it with ``folder`` locked.

        Args:
            block, threads: the most that will be used.

        Raises:
            UserError: the space is missing.
        """
        self._nbytes = int(size_gib * GIB) // block * block
        disk = Disk()
        self.direct = direct_refusal(disk, folder) is None
        path, remedy = folder / f"{PREFIX}bench.bin", "Free some space, or choose another path."
        path.unlink(missing_ok=True)  # of a run that was killed
        (self._file,) = reserve(disk, [path], [self._nbytes], [self.direct], remedy)
        memory = HostMemory(threads * 2 * block, pin=False)
        memory.tensor.random_()
        contents = bytes_of(memory.tensor)
        self._buffers = [contents[i * block : (i + 1) * block] for i in range(2 * threads)]
        try:
            self._fill(block)
        except BaseException:
            self._file.remove()
            raise

    def _fill(self, block: int) -> None:
        buffers, slots = self._buffers, range(self._nbytes // block)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: self._file.write(buffers[i % len(buffers)], i * block), slots))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.remove()

    def settle(self, block: int, threads: int, probe_s: float, most: int = MOST_PROBES) -> Settling:
        """Wait until the disk is done with the writes before, as far as its rate tells.

        What was written, deleted or reserved before goes on in the file system's journal and in the storage behind a
        virtual disk after it is said to be done: a rate measured meanwhile was a tenth of the disk's.
        """
        os.sync()
        probes: list[float] = []
        while len(probes) < most and not Settling(probes).settled:
            probes.append(self.rate("mixed", block, threads, probe_s))
        return Settling(probes)

    def rate(self, mode: str, block: int, threads: int, seconds: float) -> float:
        """GB/s moved in ``seconds`` by ``threads`` readers, writers, or both."""
        slots = self._nbytes // block
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
            jobs += [(i, self._file.read, False, i) for i in range(threads)]
        if mode == "write":
            jobs += [(i, self._file.write, False, i) for i in range(threads)]
        if mode == "mixed":
            jobs += [(threads + i, self._file.write, True, i + slots - LEAD % slots) for i in range(threads)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(lambda job: work(*job), jobs))
        elapsed = time.perf_counter() - begin
        total = sum(moved) if mode != "mixed" else 2 * min(sum(moved[:threads]), sum(moved[threads:]))
        return total / elapsed / 1e9


def store_setting(path: Path) -> tuple[int, int]:
    """(bytes of a transfer, threads) of a store on ``path``."""
    tuned = read_tuned(path)
    return tuned.get("chunk_bytes", CHUNK_BYTES), tuned.get("threads", THREADS)
