"""What the GPU benchmarks share: the clock, the copy bandwidth, and a result that prints as a table and writes JSON."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lowprec.errors import UserError


@dataclass(slots=True)
class BenchResult:
    """Rows of one benchmark; every value is a number or text."""

    title: str
    rows: list[dict]
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption="\n".join(self.notes), caption_justify="left")
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        for column in columns:
            table.add_column(column, justify="left" if isinstance(self.rows[0].get(column), str) else "right")
        for row in self.rows:
            table.add_row(*(_text(row.get(column)) for column in columns))
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def to_dict(self) -> dict:
        return {"title": self.title, "machine": machine(), "rows": self.rows, "notes": self.notes}

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")


def need_gpu(verb: str) -> None:
    """Raises UserError without a CUDA device: these benchmarks measure its kernels and nothing else."""
    if not torch.cuda.is_available():
        raise UserError(f"`lowprec bench {verb}` measures CUDA kernels, and this machine has no CUDA device.")


def machine() -> dict[str, str]:
    """GPU and versions."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: references on the CPU"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}


def milliseconds(run: Callable[[], object], repeat_ms: int = 60) -> float:
    """Median time on the device, the L2 cache flushed before each call."""
    from triton.testing import do_bench

    return do_bench(run, warmup=20, rep=repeat_ms, return_mode="median")


def graph_milliseconds(run: Callable[[], object], repeats: int = 30) -> float:
    """Median time of replays of a CUDA graph of ``run``: no gaps between kernels, whatever the host is doing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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


def copy_bandwidth(nbytes: int) -> float:
    """GB/s of a device-to-device copy that moves ``nbytes`` in all, bytes read and written both counted."""
    source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def _text(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else ""
        if value is None
        else str(value)
    )
