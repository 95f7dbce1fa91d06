"""What the kernel and the driver count of this process, for lowprec and for peers alike; and the steps' clock."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def disk_bytes() -> tuple[int, int]:
    """Bytes that this process has had read from and written to disks (/proc/self/io)."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def host_peak_gb() -> float:
    """Host memory resident at the most since the last call, GB; what is resident now counts for the next."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")  # the kernel takes the peak back to what is resident
    return int(lines["VmHWM"].split()[0]) * 1024 / 1e9


def host_gb() -> float:
    """Host memory resident now, GB."""
    host_peak_gb()
    return host_peak_gb()


def peak_gb() -> float | None:
    """GPU memory allocated at the most since the last call, GB; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 3)


class Marks:
    """Points in time of the current stream (or of the host, without a GPU), which nobody waits for until ``seconds``.

    A wait between the parts of a step would add itself to it.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._cuda:
            return [round(b - a, 4) for a, b in pairs]
        torch.cuda.synchronize()
        return [round(a.elapsed_time(b) / 1e3, 4) for a, b in pairs]


def timed_step(step: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """``step_s``, ``read_gb`` and ``written_gb`` of one step, its device waited for before and after; its result."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    before, begin = disk_bytes(), time.perf_counter()
    result = step()
    wait()
    elapsed = time.perf_counter() - begin
    read, written = (now - then for now, then in zip(disk_bytes(), before, strict=True))
    return {"step_s": round(elapsed, 3), "read_gb": round(read / 1e9, 3), "written_gb": round(written / 1e9, 3)}, result
