"""``lowprec train RECIPE -m key=a,b``: every combination, one process after the other, each in a folder of its own."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from rich.table import Table

from lowprec.config import resolve
from lowprec.display import make_console
from lowprec.errors import UserError
from lowprec.overrides import parse_overrides
from lowprec.run_folder import read_report
from lowprec.train.interrupt import EXIT_INTERRUPTED


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """The runs of a sweep, by Hydra's own grammar (lists, ``range``, ``glob``, ``choice``)."""
    batches = BasicSweeper.split_arguments(parse_overrides(overrides), max_batch_size=None)
    return [list(run) for batch in batches for run in batch]


def sweep(recipe: str, overrides: Sequence[str]) -> int:
    """Run all combinations and print how each ended.

    A process a run: memory and random state of one do not reach the next. All recipes are resolved before the first
    run, so that a typing mistake in the last is found at once.

    Returns:
        0 where all finished; else the exit code of the first that did not.

    Raises:
        UserError: a combination is not a valid recipe, or ``train.output_dir`` would be shared.
    """
    runs = combinations(overrides)
    varied = [key for key in {pair.partition("=")[0]: None for run in runs for pair in run}
              if len({_value(run, key) for run in runs}) > 1]  # fmt: skip
    if "train.output_dir" in varied:
        raise UserError("A sweep makes a folder for each run below train.output_dir: give that one value.")
    folders = [Path(str(resolve(recipe, run)[0].train.output_dir), _folder_name(run, varied)) for run in runs]
    if not any(_value(run, "train.resume_from_checkpoint") for run in runs):
        taken = [str(folder) for folder in folders if folder.is_dir() and any(folder.iterdir())]
        if taken:
            raise UserError(
                f"{', '.join(taken)} {'is' if len(taken) == 1 else 'are'} not empty. Add "
                "train.resume_from_checkpoint=auto to go on with that sweep, or choose another train.output_dir."
            )
    console, codes = make_console(), []
    for number, (run, folder) in enumerate(zip(runs, folders, strict=True), 1):
        told = " ".join(f"{key}={_value(run, key)}" for key in varied)
        console.rule(f"run {number} of {len(runs)}: {told}", align="left")
        own = [pair for pair in run if pair.partition("=")[0] != "train.output_dir"]
        command = [sys.executable, "-m", "lowprec", "train", recipe, *own, f'train.output_dir="{folder}"']
        codes.append(_exit_code(command))
        if codes[-1] in (EXIT_INTERRUPTED, 130):
            break
    table = Table(*varied, "ended", "held-out loss", "trained tok/s", "peak VRAM GiB", "folder")
    for run, folder in zip(runs, folders, strict=True):
        report = read_report(folder)
        figures = {"eval_loss_after": ".3f", "tokens_per_second": ",.0f", "peak_vram_gib": ".2f"}
        table.add_row(
            *(_value(run, key) for key in varied),
            report.get("status", "not run"),
            *("" if report.get(key) is None else f"{report[key]:{form}}" for key, form in figures.items()),
            str(folder),
        )
    console.print(table)
    return next((code for code in codes if code), 0)


def _exit_code(command: list[str]) -> int:
    """Run one training process to its end. It is the one to stop: it finishes its step and saves.

    A Ctrl-C reaches it from the terminal, as it does us, and a SIGTERM is handed on; ``subprocess.run`` would kill it
    a quarter of a second after the Ctrl-C, while it saves.
    """
    with subprocess.Popen(command) as process:
        handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _value(run: list[str], key: str) -> str:
    return next((pair.partition("=")[2] for pair in run if pair.partition("=")[0] == key), "")


def _folder_name(run: list[str], varied: list[str]) -> str:
    name = ",".join(f"{key}={_value(run, key)}" for key in varied) or "run"
    return "".join(character if character.isalnum() or character in "=,.-_" else "-" for character in name)
