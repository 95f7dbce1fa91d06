"""The clock of everything that is measured: benchmarks, the machine's profile, and the choice ``weights=auto``."""

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch


def milliseconds(
    run: Callable[[], object], repeat_ms: float = 60, device: str | torch.device = "cuda", warmup_ms: float = 20
) -> float:
    """Time of one call on ``device``.

    On a GPU the median, by events, the L2 cache flushed before each call. On a processor the least of the calls that
    fit into ``repeat_ms``, at least three: whatever else runs there only ever adds.
    """
    if torch.device(device).type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=warmup_ms, rep=repeat_ms, return_mode="median")
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < repeat_ms:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)


@cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """The one stream of a device on which this process captures graphs. cuBLAS keeps a workspace for each stream and
    thread that it has multiplied for, 32 MiB on Hopper: with a stream a trial, ``weights=auto`` left 0.66 GB behind."""
    return torch.cuda.Stream(device)


def graph_milliseconds(run: Callable[[], object], repeats: int = 30) -> float:
    """Median time of replays of a CUDA graph of ``run``: no gaps between kernels, whatever the host is doing."""
    stream = capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(nbytes: int, device: str | torch.device = "cuda") -> float:
    """GB/s of a copy within the memory of ``device`` that moves ``nbytes`` in all, read and written both counted."""
    source = torch.ones(nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return nbytes / milliseconds(lambda: target.copy_(source), device=device) / 1e6


def link_bandwidth(nbytes: int, device: torch.device) -> tuple[float, float]:
    """GB/s from pinned host memory to a GPU, and back."""
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    to_device = milliseconds(lambda: there.copy_(host, non_blocking=True), device=device)
    to_host = milliseconds(lambda: host.copy_(there, non_blocking=True), device=device)
    return nbytes / to_device / 1e6, nbytes / to_host / 1e6
