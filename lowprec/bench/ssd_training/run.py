"""The runs of ``lowprec bench ssd --works``: the disk, and each work in a process of its own, kept as JSON lines."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lowprec.bench import ssd
from lowprec.bench.measure import machine
from lowprec.bench.processes import figures_of, path_of, read, versions
from lowprec.bench.raw_disk import RawFile, store_setting
from lowprec.bench.ssd_training import deepspeed
from lowprec.bench.ssd_training.raw import RawMeasurement
from lowprec.bench.ssd_training.table import markdown
from lowprec.bench.ssd_training.works import KNOWN, TINY_WORK, WORKS, Work
from lowprec.errors import UserError
from lowprec.optim.path_lock import PathLock
from lowprec.optim.stores import read_tuned

RESULTS = "bench_ssd.jsonl"
SHORTEST_S = 45  # a process is not begun with less time than this
RAW = RawMeasurement()


def bench_ssd_training(
    works: Sequence[str],
    *,
    path: str | Path,
    peers: Sequence[str] = (),
    minutes: float | None = None,
    raw: RawMeasurement = RAW,
    say: Callable[[str], None] = print,
) -> str:
    """Measure the works over a store in ``path``, each beside the disk's raw rate before and after it; gives the table.

    The setting is the one that ``lowprec bench ssd --path P`` kept; where it never ran, it runs first.

    Args:
        works: names of works.WORKS, ``all`` of them, or ``tiny``.
        path: the folder on the disk; keeps ``bench_ssd.jsonl`` and ``.md``.
        peers: ``deepspeed`` (or ``all``), run on the same path right after the first work that it is the peer of.
        minutes: nothing is begun that could not end in that time, and what goes on is ended; call again to go on.
            What is in the results is not repeated.
        raw: how the disk is measured before and after each work that uses it.

    Raises:
        UserError: an unknown work or peer, no GPU, no DeepSpeed.
    """
    chosen, with_peer = _select(works), _wants_peer(peers)
    if not torch.cuda.is_available() and chosen != [TINY_WORK]:
        raise UserError(
            f"`lowprec bench ssd --works {chosen[0].name}` trains on a CUDA device, and this machine has none. "
            f"--works {TINY_WORK.name} tries it out anywhere."
        )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    results, begin, on = path / RESULTS, time.monotonic(), machine()["gpu"]
    if not read_tuned(path) and chosen != [TINY_WORK]:
        best = ssd.run(path).best
        say(f"{path}: {best.block_mib:g} MiB and {best.threads} threads kept")
    for work in chosen:
        for by in ("lowprec", "deepspeed") if work.peer and with_peer else ("lowprec",):
            done = [row["work"] for row in read(results) if (row["by"], row["gpu"], row["status"]) == (by, on, "ok")]
            if work.name in done or (by == "deepspeed" and any(work.same_peer(KNOWN[name]) for name in done)):
                continue
            end = None if minutes is None else begin + 60 * minutes
            needed = SHORTEST_S + (2 * raw.least_s if _on_disk(work, by) else 0)
            if end is not None and end - time.monotonic() < needed:
                say("The time is used up; the same command goes on from here.")
                return _write_table(results)
            say(f"{work.name}: {by} ...")
            row: dict[str, Any] = {"work": work.name, "by": by, "gpu": on, "versions": versions()}
            row |= {"when": datetime.now(UTC).isoformat(timespec="seconds"), "settings": work.to_dict()}
            row |= _measure(work, by, path, end, raw)
            if row["status"] == "time is up":
                say(f"{work.name}: {by} was ended with the time; it starts again with the next call.")
                return _write_table(results)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            say(
                f"{work.name}: {by}: "
                + (f"{row['step_s_p50']:.2f} s a step" if row["status"] == "ok" else row["error"])
            )
    return _write_table(results)


def _on_disk(work: Work, by: str) -> bool:
    return (work.store if by == "lowprec" else work.peer) in ("ssd", "nvme")


def _measure(work: Work, by: str, path: Path, end: float | None, raw: RawMeasurement) -> dict[str, Any]:
    """Figures of one run, which is over at ``end``; where the disk takes part, with its ``raw`` rates around it."""

    def left(*, but: float = 0.0) -> float | None:
        return None if end is None else end - time.monotonic() - but

    if not _on_disk(work, by):
        return _train(work, by, path, left())
    folder, (block, threads) = path / "raw", store_setting(path)
    try:
        # One file for both measurements, beside the store's: that it is laid out and removed is no part of either.
        with PathLock(folder), RawFile(folder, raw.file_gib, block, threads) as file:
            with PathLock(path):
                before = raw.take(file, block, threads, left(but=SHORTEST_S + raw.least_s))
            for_steps = left(but=raw.least_s)
            if for_steps is not None and for_steps < SHORTEST_S:
                return {"status": "time is up"}
            figures = _train(work, by, path, for_steps)
            if figures["status"] != "ok":
                return figures
            after = raw.take(file, block, threads, left())
            rates = {"block_mib": block / 2**20, "threads": threads, "direct": file.direct}
            return figures | {"raw": rates | {"before": before, "after": after}}
    finally:
        with suppress(OSError):  # it is not empty where another process measures
            folder.rmdir()


def _train(work: Work, by: str, path: Path, left: float | None) -> dict[str, Any]:
    """Figures of the work's own process."""
    # DeepSpeed keeps its files: a folder of its own, taken away afterwards.
    place = path if by == "lowprec" else path / "deepspeed"
    arguments, log = [work.name, by, str(place.resolve())], path / f"{work.name}-{by}.log"
    try:
        figures, seconds = figures_of("lowprec.bench.ssd_training.worker", arguments, by, log, left)
    finally:
        if place != path:
            shutil.rmtree(place, ignore_errors=True)
    return figures | {"seconds": round(seconds, 1)}


def _select(names: Sequence[str]) -> list[Work]:
    if list(names) == ["all"]:
        return list(WORKS.values())
    for name in names:
        if name not in KNOWN:
            raise UserError(f"--works {name} is no work of bench ssd. Choose from: {', '.join(KNOWN)}, or all.")
    return [work for work in KNOWN.values() if work.name in names]


def _wants_peer(names: Sequence[str]) -> bool:
    for name in names:
        if name not in ("deepspeed", "all"):
            raise UserError(f"--peers {name} is not known to bench ssd: the peer here is deepspeed.")
    reason = deepspeed.why_not(path_of("deepspeed")) if names else None
    if reason is not None:
        raise UserError(f"--peers {','.join(names)}: {reason}.")
    return bool(names)


def _write_table(results: Path) -> str:
    text = markdown(read(results))
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    return text
