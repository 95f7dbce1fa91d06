"""The study from its first cell to its page: resumable, a line a cell."""

import json
import multiprocessing
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lowprec.display import quiet_bitsandbytes
from lowprec.errors import UserError
from lowprec.profiling.folder import made_folder
from lowprec.profiling.study.cells import SHAPES, Cell, Shape, all_cells
from lowprec.profiling.table import gib
from lowprec.report import hardware, versions

ROWS, ABOUT = "cells.jsonl", "study.json"
WARMUP, STEPS = 10, 50
REDUCED_WARMUP, REDUCED_STEPS = 3, 8
REDUCED_MINUTES = 7.5


def run_study(
    console: Console,
    *,
    shape: str = "qwen2.5-1.5b",
    reduced: bool = False,
    output: str | None = None,
    warmup: int | None = None,
    steps: int | None = None,
    cells: Sequence[Cell] | None = None,
) -> Path:
    """Measure the cells that are missing, then write the CSV, the plots and the page.

    Args:
        shape: ``qwen2.5-1.5b`` or ``tiny``.
        reduced: fewer cells and steps, and an end after 7.5 minutes; the same command goes on.
        output: the study's folder; by default ``studies/consumer_gpu`` or ``studies/consumer_gpu_reduced``.
        warmup, steps: of each cell.
        cells: which; by default all of the shape.

    Returns:
        The folder.

    Raises:
        UserError: an unknown shape, a folder that cannot be made, or one with another study in it.
        KeyboardInterrupt: of the user; the cells that were done stay, and the same command goes on.
    """
    if shape not in SHAPES:
        raise UserError(f"--shape {shape} is unknown: choose one of {', '.join(SHAPES)}.")
    folder = made_folder(Path(output or f"studies/consumer_gpu{'_reduced' if reduced else ''}"))
    warmup = warmup or (REDUCED_WARMUP if reduced else WARMUP)
    steps = steps or (REDUCED_STEPS if reduced else STEPS)
    _remember(folder, {"shape": shape, "warmup": warmup, "steps": steps})
    wanted = list(cells) if cells is not None else all_cells(SHAPES[shape], reduced=reduced)
    done = {row["key"] for row in read_rows(folder)}
    left = [cell for cell in wanted if cell.key not in done]
    console.print(
        f"consumer_gpu, {shape}, a limit of {SHAPES[shape].limit_gib:g} GiB: {len(wanted)} cells, "
        f"{len(wanted) - len(left)} of them in {folder} already.",
        highlight=False,
    )
    deadline = time.time() + 60 * REDUCED_MINUTES if reduced else None
    try:
        for dtype in dict.fromkeys(cell.dtype for cell in left):  # a process has one mixed precision
            chosen = [cell for cell in left if cell.dtype == dtype]
            _run_all(chosen, shape, folder, warmup, steps, len(wanted), deadline)
    except KeyboardInterrupt:
        console.print(f"{len(read_rows(folder))} cells are in {folder}; the same command goes on.", highlight=False)
        raise
    missing = {cell.key for cell in wanted} - {row["key"] for row in read_rows(folder)}
    if missing:
        console.print(f"{len(missing)} cells are left; the same command goes on with them.", highlight=False)
    from lowprec.profiling.study.report import write_report  # matplotlib, once the work is done

    for path in write_report(folder):
        console.print(f"wrote {path}", highlight=False)
    return folder


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The cells that were measured; a line cut off by a kill is left out."""
    rows = []
    file = folder / ROWS
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _remember(folder: Path, about: dict[str, Any]) -> None:
    """Write what the study is, or hold it against what is there."""
    file = folder / ABOUT
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        other = {key: stored.get(key) for key in about if stored.get(key) != about[key]}
        if other:
            told = ", ".join(f"{key}={value}" for key, value in other.items())
            raise UserError(f"{folder} holds another study ({told}). Choose another folder with --output.")
        return
    facts = about | {"versions": versions(), "hardware": hardware(), "date": time.strftime("%Y-%m-%d")}
    file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _run_all(
    cells: list[Cell], shape: str, folder: Path, warmup: int, steps: int, total: int, deadline: float | None
) -> None:
    """Work the cells off in a process of their own. Where it dies in a cell, that one failed, and the rest go on."""
    context = multiprocessing.get_context("spawn")
    while cells and not _late(deadline):
        process = context.Process(target=_work, args=(cells, shape, str(folder), warmup, steps, total, deadline))
        process.start()
        try:
            process.join()
        finally:  # the user stops it: the cell under way is lost, and nothing goes on in the background
            process.kill()
            process.join()
        done = {row["key"] for row in read_rows(folder)}
        cells = [cell for cell in cells if cell.key not in done]
        if process.exitcode and cells:
            lost, *cells = cells
            row = {"key": lost.key, **lost.to_dict(), "status": "failed", "warmup": warmup, "steps": steps}
            _append(folder, row | {"error": f"its process ended with exit code {process.exitcode}"}, total)


def _work(
    cells: list[Cell], shape: str, folder: str, warmup: int, steps: int, total: int, deadline: float | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes, and the first one ends this
    warnings.simplefilter("ignore")  # other libraries', once a cell: a cell has one line
    quiet_bitsandbytes()
    parent = multiprocessing.parent_process()
    from lowprec.profiling.study.measure import measure, recipe_of
    from lowprec.train.launch import start_accelerator

    try:
        accelerator, _ = start_accelerator(recipe_of(cells[0]))
    except ValueError as error:  # Accelerate refuses fp16 without a GPU
        for cell in cells:
            row = {"key": cell.key, **cell.to_dict(), "status": "failed", "warmup": warmup, "steps": steps}
            _append(Path(folder), row | {"error": str(error)}, total)
        return
    for cell in cells:
        if _late(deadline) or (parent is not None and not parent.is_alive()):  # killed: it could not end this process
            return
        _append(Path(folder), measure(cell, SHAPES[shape], accelerator, warmup, steps), total)


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.time() > deadline


def _append(folder: Path, row: dict[str, Any], total: int) -> None:
    """A row of the study, and the line that tells of it."""
    with (folder / ROWS).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row))  # on a line of its own, whatever a kill has left of the one before
    if row["status"] == "ok":
        peak = f", {gib(row['peak_vram_gib'])}" if row.get("peak_vram_gib") else ""
        told = f"{row['tokens_per_second']:,.0f} tokens/s{peak}"
    else:
        told = row["status"].replace("_", " ") + (f": {row['error']}" if "error" in row else "")
    print(f"[{len(read_rows(folder))}/{total}] {row['key']}: {told} ({row.get('seconds', 0):.0f} s)", flush=True)


def shape_of(about: dict[str, Any]) -> Shape:
    return SHAPES[about["shape"]]


def command_of(about: dict[str, Any]) -> str:
    """What repeats a study. The steps tell which it was: no other option sets them."""
    is_reduced = (about["warmup"], about["steps"]) == (REDUCED_WARMUP, REDUCED_STEPS)
    return f"lowprec profile --study consumer_gpu --shape {about['shape']}{' --reduced' if is_reduced else ''}"
