"""Steps timed in the same way for everyone: the device is waited for before and after each."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Of the timed steps. GB are 1e9 bytes."""

    step_ms_p50: float
    step_ms_p20: float
    step_ms_p80: float
    host_ms_p50: float
    """Until the host has launched a step on a device that had nothing to do."""
    tokens_per_second: float
    peak_gb: float | None
    """Allocated, warm-up included; None without a GPU."""
    reserved_gb: float | None
    """Held by PyTorch's allocator at the most."""
    last_loss: float

    def to_dict(self) -> dict:
        return asdict(self)


def time_steps(step: Callable[[], torch.Tensor], tokens: int, warmup: int, timed: int, device: torch.device) -> Timing:
    """Run ``warmup`` and then ``timed`` steps; ``step`` gives the loss."""
    cuda = device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    if cuda:
        torch.cuda.empty_cache()  # what building the model left is not the step's
        torch.cuda.reset_peak_memory_stats(device)
    seconds, host_seconds, loss = [], [], torch.zeros(())
    for _ in range(warmup + timed):
        wait()
        begin = time.perf_counter()
        loss = step()
        host_seconds.append(time.perf_counter() - begin)
        wait()
        seconds.append(time.perf_counter() - begin)
    last = sorted(1e3 * s for s in seconds[warmup:])
    median = statistics.median(last)
    return Timing(
        step_ms_p50=round(median, 3),
        step_ms_p20=round(last[math.ceil(0.2 * len(last)) - 1], 3),
        step_ms_p80=round(last[math.ceil(0.8 * len(last)) - 1], 3),
        host_ms_p50=round(1e3 * statistics.median(host_seconds[warmup:]), 3),
        tokens_per_second=round(tokens / median * 1e3, 1),
        peak_gb=round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if cuda else None,
        reserved_gb=round(torch.cuda.max_memory_reserved(device) / 1e9, 3) if cuda else None,
        last_loss=round(float(loss), 4),
    )


def cap_memory(gib: float | None, device: torch.device) -> None:
    """Let this process's allocator hold at most ``gib`` from now on; what building the model left is given back."""
    if gib is None or device.type != "cuda":
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device() if device.index is None else device.index  # it takes no bare "cuda"
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), index)
