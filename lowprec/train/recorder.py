"""Everything a run writes about itself: metrics, trackers, ``report.json``, the plot, the table at the end."""

import time
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from lowprec.checkpoint import MANIFEST, checkpoints, is_disk_full
from lowprec.config import Recipe
from lowprec.machine import EnergyMeter, run_footprint
from lowprec.report import hardware, peak_memory, phases, plot_loss, print_summary, speed, versions
from lowprec.run_folder import RunFolder, Status, read_report

SECONDS_BETWEEN_WRITES = 1.0
"""Of rows: beside an H100 the file took the host 0.4 ms and TensorBoard 0.6, of steps of 24 ms that waited for it."""


class Recorder:
    """Writes on the main process alone."""

    def __init__(self, recipe: Recipe, folder: RunFolder, accelerator: Accelerator, console: Console) -> None:
        self.recipe, self.folder, self.accelerator, self.console = recipe, folder, accelerator, console
        self.facts: dict[str, Any] = {"layers": {}, "dtypes": {}, "notes": []}
        """What the report says beside the progress: filled as it becomes known."""
        self._rows: list[dict[str, Any]] = []
        self._due: list[dict[str, Any]] = []
        self._written_at = 0.0
        self._gpus = _gpus(accelerator)
        self._meter = EnergyMeter(self._gpus)
        self._earlier: dict[str, Any] = {}
        self._disk_was_full = False

    def begin(self, first_step: int) -> None:
        """Write the resolved recipe, and drop what an earlier run measured at steps that will be taken again.

        Args:
            first_step: the last step that is already done; 0 at the beginning.
        """
        if self.folder.resume_from:
            self._earlier = read_report(self.folder.path).get("footprint", {})
        if self.accelerator.is_main_process:
            self.folder.forget_metrics_after(first_step if self.folder.resume_from else -1)
            self.folder.write_recipe(self.recipe.to_yaml())
        self.accelerator.init_trackers("lowprec", config={"recipe": self.recipe.name})

    def row(self, row: dict[str, Any]) -> None:
        """A row of ``metrics.jsonl``, written when ``SECONDS_BETWEEN_WRITES`` have passed since the last write, with
        those that came meanwhile. Trackers get the newest of their steps, and every evaluation."""
        if "loss" in row:
            self._rows.append(row)
        self._due.append(row)
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are due. A full disk ends no run here: they are kept for the next time."""
        due, self._due = self._due, []
        if due and self.accelerator.is_main_process:
            try:
                self.folder.append_metrics(*due)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                if not self._disk_was_full:
                    text = f"The disk of {self.folder.path} is full: training goes on, but make room before it saves."
                    self.console.print(f"[yellow]Note:[/] {text}", highlight=False)
                self._disk_was_full, self._due, self._written_at = True, due, time.monotonic()
                return
            self._disk_was_full = False
        newest = max((row["step"] for row in due if "loss" in row), default=None)
        for row in due:
            if "loss" not in row or row["step"] == newest:
                self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        self._meter.keep_up()
        self._written_at = time.monotonic()

    def report(self, status: Status, progress: dict[str, Any], error: str | None = None) -> dict[str, Any]:
        """Write the rows that are due, ``report.json`` and, where something was measured, ``loss.png``."""
        self.flush()
        report = {
            "status": status.value,
            "recipe": self.recipe.name,
            "steps": progress["step"],
            "eval_loss_before": progress["eval_loss_before"],
            "eval_loss_after": progress["eval_loss"] if progress["eval_step"] else None,
            "train_tokens": progress["trained_tokens"],
            "tokens_per_second": None,
            "step_time_ms_p50": None,
            **speed(self._rows),
            **phases(self._rows),
            **peak_memory(),
            "footprint": run_footprint(
                self._meter.read(), len(self._gpus), self.recipe.train.grid_g_co2e_per_kwh, self._earlier
            ),
            **self.facts,
            "answers_before": progress["answers_before"],
            "answers_after": progress["answers"],
            "versions": versions(),
            "hardware": hardware(),
        }
        if error is not None:
            report["error"] = error
        if self.accelerator.is_main_process:
            self.folder.write_report(report)
            rows = self.folder.metrics()
            if rows:
                plot_loss(rows, self.folder.path / "loss.png", self.recipe.name)
        return report

    def finish(self, report: dict[str, Any], prompts: list[tuple[str, str]]) -> None:
        """Print the answers before and after, and the table.

        Args:
            prompts: the text of each sample prompt, and the answer the data give.
        """
        for (prompt, reference), before, after in zip(
            prompts, report["answers_before"], report["answers_after"], strict=False
        ):
            self.console.print(f"\n[bold]Question[/]  {_plain(prompt)}", highlight=False)
            self.console.print(f"[bold]Before[/]    {_plain(before)}", highlight=False)
            self.console.print(f"[bold]After[/]     {_plain(after)}", highlight=False)
            self.console.print(f"[bold]Data[/]      {_plain(reference)}\n", highlight=False)
        print_summary(report, self.folder.path, self.console)

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint, for messages: not verified, since that reads all of it."""
        sealed = [folder for folder in checkpoints(self.folder.checkpoints) if (folder / MANIFEST).is_file()]
        return str(sealed[-1]) if sealed else None


def _gpus(accelerator: Accelerator) -> list[torch.device]:
    """The GPUs that the processes of this machine train on; empty on a processor."""
    if accelerator.device.type != "cuda":
        return []
    if accelerator.num_processes == 1:
        return [accelerator.device]
    return [torch.device("cuda", index) for index in range(min(accelerator.num_processes, torch.cuda.device_count()))]


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("[", "\\[")
