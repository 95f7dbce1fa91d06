"""What the GPU benchmarks share: a result that prints as a table and writes JSON. The clock: lowprec.machine.timing."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from lowprec.errors import UserError

PEAK_TFLOPS = {"H100": (989, 1979), "H200": (989, 1979), "4090": (165, 330), "A100": (312, 624)}
"""Dense 16-bit and 8-bit rates of datasheets."""


@dataclass(slots=True)
class BenchResult:
    """Rows of one benchmark; every value is a number or text."""

    title: str
    rows: list[dict]
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        caption = escape("\n".join(self.notes))  # notes and names of other libraries may have brackets
        table = Table(title=self.title, title_justify="left", caption=caption, caption_justify="left")
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        for column in columns:
            table.add_column(column, justify="left" if isinstance(self.rows[0].get(column), str) else "right")
        for row in self.rows:
            table.add_row(*(escape(_text(row.get(column))) for column in columns))
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


def peak_tflops(eight_bit: bool) -> float:
    """The datasheet's rate of this GPU's 8-bit or 16-bit products; NaN for a card that is not listed."""
    name = torch.cuda.get_device_name()
    return next((rates[eight_bit] for card, rates in PEAK_TFLOPS.items() if card in name), float("nan"))


def machine() -> dict[str, str]:
    """GPU and versions."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: references on the CPU"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}


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
