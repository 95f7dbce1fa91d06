"""The folder a run leaves: recipe, report, metrics, plot, checkpoints, final model. One run at a time may write it."""

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from lowprec.checkpoint import checkpoints, damage, newest_whole, remove_unfinished, step_of
from lowprec.errors import UserError
from lowprec.train.options import AUTO

REPORT = "report.json"
METRICS = "metrics.jsonl"


class Status(StrEnum):
    """How a run ended, as ``report.json`` has it."""

    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass
class RunFolder:
    """Paths and files of one run. ``open_run`` makes it."""

    path: Path
    resume_from: Path | None
    """The whole checkpoint to begin from, or None to begin at the beginning."""
    messages: list[str]
    _lock: TextIO | None = None
    """Held by the main process."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def write_recipe(self, text: str) -> None:
        _write_whole(self.path / "recipe.yaml", text)

    def write_report(self, report: dict[str, Any]) -> None:
        _write_whole(self.path / REPORT, json.dumps(report, indent=2) + "\n")

    def append_metrics(self, *rows: dict[str, Any]) -> None:
        """Add rows to ``metrics.jsonl``: ``step`` and what was measured at it."""
        file = self.path / METRICS
        before = file.stat().st_size if file.exists() else 0
        try:
            with file.open("a") as appended:
                appended.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError:
            os.truncate(file, before)  # a full disk takes a part of a line
            raise

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run will take again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        _write_whole(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


def open_run(output_dir: str, resume_from_checkpoint: str | None) -> RunFolder | None:
    """Claim a run folder and find where to begin.

    Args:
        output_dir: made where it is missing.
        resume_from_checkpoint: None, ``auto``, or a checkpoint folder.

    Returns:
        The folder, or None where ``auto`` finds a finished run whose ``final/`` is whole.

    Raises:
        UserError: the folder holds something and nothing says to resume; another process writes it; the checkpoint
            named is not whole.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"train.output_dir={output_dir} is a file. Choose a folder.")
    if path.is_dir() and resume_from_checkpoint is None and any(file.name != ".lock" for file in path.iterdir()):
        raise UserError(
            f"train.output_dir={output_dir} is not empty. Add train.resume_from_checkpoint=auto to go on with the run "
            "in it, or choose another train.output_dir."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
        _claim(lock, path)
    except OSError as error:
        raise UserError(
            f"train.output_dir={output_dir} cannot be written ({error.strerror}). Choose another."
        ) from error
    remove_unfinished(path)
    remove_unfinished(path / "checkpoints")
    folder = RunFolder(path, None, [], lock)
    if resume_from_checkpoint == AUTO:
        if read_report(path).get("status") == Status.FINISHED.value:
            wrong = damage(folder.final)
            if wrong is None:
                lock.close()
                return None
            folder.messages.append(f"The run is marked as finished, but {wrong}; going on from its checkpoints.")
        folder.resume_from, complaints = newest_whole(folder.checkpoints)
        folder.messages += [f"Passing over a damaged checkpoint: {wrong}." for wrong in complaints]
        if folder.resume_from is None:
            what = "No checkpoint here is whole" if complaints else f"There is nothing to resume in {path}"
            folder.messages.append(f"{what}; beginning from the start.")
    elif resume_from_checkpoint is not None:
        folder.resume_from = Path(resume_from_checkpoint)
        wrong = damage(folder.resume_from)
        if wrong is not None:
            inside, _ = newest_whole(folder.resume_from / "checkpoints")
            remedy = f"Its newest checkpoint is {inside}" if inside else "Name another checkpoint folder (step-N)"
            raise UserError(
                f"train.resume_from_checkpoint={resume_from_checkpoint} cannot be used: {wrong}. {remedy}, or set auto "
                "for the newest whole one of train.output_dir."
            )
        _refuse_branching(folder, folder.resume_from)
    return folder


def _refuse_branching(folder: RunFolder, checkpoint: Path) -> None:
    """Two lines of checkpoints in one folder: the older would later pass for the newest."""
    found = checkpoints(folder.checkpoints)
    if checkpoint.resolve().parent != folder.checkpoints.resolve():
        own = [other.name for other in found] + (["final"] if folder.final.exists() else [])
        if own:
            raise UserError(
                f"{folder.path} has {', '.join(own)} of a run of its own, and {checkpoint} is of another. Choose "
                "another train.output_dir, or set train.resume_from_checkpoint=auto to go on with that run."
            )
        return
    newer = [other.name for other in found if step_of(other) > step_of(checkpoint)]
    if newer:
        raise UserError(
            f"{checkpoint} is older than {', '.join(newer)} beside it. Choose another train.output_dir to branch off "
            "from it, or remove the newer ones to take it up again here."
        )


def read_report(path: Path) -> dict[str, Any]:
    """``report.json`` of a run folder; empty where there is none or it is not readable."""
    try:
        report = json.loads((path / REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line cut off by a kill is left out."""
    try:
        lines: Iterable[str] = (path / METRICS).read_text().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _claim(lock: TextIO, path: Path) -> None:
    # The lock dies with its process, so a killed run leaves nothing to clean.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise UserError(
            f"Another run (process {owner}) is writing {path}. Wait for it, stop it, or change train.output_dir."
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _write_whole(path: Path, text: str) -> None:
    """Replace a file in one rename, so that a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
