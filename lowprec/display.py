"""What the user sees while a run goes on: a live bar on a terminal, plain lines in a log file."""

import logging
import os
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0
_LOG_WIDTH = 160


def make_console() -> Console:
    """Standard output, as wide as its terminal; in a log file wide enough that lines and tables stay whole."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _LOG_WIDTH
    return console


def quiet_bitsandbytes() -> None:
    """On processors with bf16 units it warns that it did not download a kernel, which nothing here calls."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Display:
    """A progress bar with the last step's figures; where the output is no terminal, a line every ten seconds."""

    def __init__(self, console: Console, first_step: int, num_steps: int) -> None:
        self.console = console
        self.num_steps = num_steps
        self._last_line = 0.0
        self._first_line_due = True
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=num_steps, completed=first_step, figures="")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, row: dict[str, Any]) -> None:
        """Show a row of ``metrics.jsonl``."""
        figures = (
            f"loss {row['loss']:.3f}  lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} trained tok/s  "
            f"{peak_memory(row)}"
        )
        self._progress.update(self._task, completed=row["step"], figures=figures)
        if self.console.is_terminal:
            return
        now = time.monotonic()
        if self._first_line_due or now - self._last_line >= _SECONDS_BETWEEN_LINES or row["step"] == self.num_steps:
            left = (self.num_steps - row["step"]) * row["step_time_ms"] / 1000
            self.console.print(f"step {row['step']}/{self.num_steps}  {figures}  {left:.0f} s left", highlight=False)
            self._last_line, self._first_line_due = now, False

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(text, highlight=False)


def peak_memory(row: dict[str, Any]) -> str:
    """``VRAM 5.2 GiB`` on CUDA, else ``RAM 1.9 GiB``."""
    if row.get("peak_vram_gib"):
        return f"VRAM {row['peak_vram_gib']:.1f} GiB"
    return f"RAM {row['peak_ram_gib']:.1f} GiB"
