"""The runs of ``lowprec bench train``: which are due, each in its process, results kept as JSON lines."""

import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from lowprec.bench.measure import machine
from lowprec.bench.processes import figures_of, path_of, read, versions
from lowprec.bench.train import peers as peers_module
from lowprec.bench.train.plot import plot
from lowprec.bench.train.table import markdown
from lowprec.bench.train.works import TABLE, TINY_WORKS, Work, all_works
from lowprec.errors import UserError

OURS, LIMIT = "lowprec", "limit"
RESULTS = "bench_train.jsonl"


def bench_train(
    works: Sequence[str] | None = None,
    peers: Sequence[str] = (),
    *,
    folder: str | Path = "bench_train",
    minutes: float | None = None,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Run what is not in the results yet, and give back the table in markdown.

    Args:
        works: names, families (``longest_8b``), ``grid``, or ``eight_bit``; None for the table of docs/benchmarks.
        peers: libraries to measure beside lowprec where a work lists them; ``all`` for those that are installed.
        folder: holds ``bench_train.jsonl``, ``.md`` and ``.png``, and what runs need; results in it are not repeated.
        minutes: a run that goes on beyond this time is ended: for machines that are lent in slices. Call again to go
            on; what failed is tried again then, what ran out of memory is not.
        again: repeat runs that are in the results.
        say: told of every run.

    Raises:
        UserError: an unknown work or peer, a peer that is not installed, no GPU.
    """
    chosen = select(works)
    wanted = _peers(peers)
    _check_machine(chosen)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / RESULTS
    begin = time.monotonic()
    on = machine()["gpu"]
    for work in chosen:
        if _ended_before(work, read(results), on):
            continue
        for peer in _runs(work, wanted):
            known = [r for r in read(results) if _is(r, work, peer, on) and r["status"] != "failed"]
            if known and not again:
                continue
            left = None if minutes is None else 60 * minutes - (time.monotonic() - begin)
            if left is not None and left < 45:
                say("The time is used up; the same command goes on from here.")
                return _write_table(results)
            say(f"{work.name}: {peer} ...")
            figures, seconds = _one(work, peer, folder, left)
            if figures.get("status") == "time is up":
                say(f"{work.name}: {peer} was ended with the time; it starts again with the next call.")
                return _write_table(results)
            row = {"work": work.name, "peer": peer, "gpu": on, "seconds": round(seconds, 1)}
            row |= {"versions": versions(path_of(peer))}
            row |= {"when": datetime.now(UTC).isoformat(timespec="seconds")} | figures
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            say(f"{work.name}: {peer}: {_in_words(row)}")
            if figures["status"] != "ok" and peer == OURS and "@" in work.name:
                break
    return _write_table(results)


def select(names: Sequence[str] | None) -> list[Work]:
    """The works of these names, in the order of running. A name is a work's, a family's, or how several begin."""
    works = list(all_works().values())
    whole = {name for work in works for name in (work.name, work.family)}
    chosen: set[str] = set()
    for name in names or TABLE:
        found = {w.name for w in works if name in (w.name, w.family)}
        if name not in whole:
            found = {w.name for w in works if w.name.startswith(f"{name}_")}
        if not found:
            choices = ", ".join(dict.fromkeys(work.family for work in works))
            raise UserError(f"--works {name} is no work. Choose from: {choices}, grid, or eight_bit.")
        chosen |= found
    return [work for work in works if work.name in chosen]


def _peers(names: Sequence[str]) -> tuple[str, ...]:
    if list(names) == ["all"]:
        return tuple(peer for peer in peers_module.NEEDS if peers_module.why_not(peer, path_of(peer)) is None)
    for name in names:
        if name not in peers_module.NEEDS:
            raise UserError(f"--peers {name} is not known. Choose from: {', '.join(peers_module.NEEDS)}, or all.")
        reason = peers_module.why_not(name, path_of(name))
        if reason is not None:
            raise UserError(f"--peers {name}: {reason}.")
    return tuple(names)


def _runs(work: Work, peers: tuple[str, ...]) -> list[str]:
    """lowprec first: a variant that does not run needs no peers."""
    chosen = [OURS, *(peer for peer in work.peers if peer in peers)]
    return [*chosen, LIMIT] if machine_has_gpu() and work.peers and "grid" not in work.name else chosen


def machine_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_machine(works: list[Work]) -> None:
    large = [work.name for work in works if work.family not in TINY_WORKS]
    if large and not machine_has_gpu():
        raise UserError(
            f"`lowprec bench train` measures {large[0]} on a CUDA device, and this machine has none. "
            f"--works {','.join(TINY_WORKS)} tries it out anywhere."
        )


def _ended_before(work: Work, rows: list[dict], on: str) -> bool:
    """Whether an earlier variant of this family failed: a longer sequence or a smaller cap would, too."""
    variants = [other for other in all_works().values() if other.family == work.family]
    earlier = {other.name for other in variants[: [other.name for other in variants].index(work.name)]}
    last = {row["work"]: row for row in rows if row["peer"] == OURS and row["gpu"] == on and row["work"] in earlier}
    return any(row["status"] != "ok" for row in last.values())


def _is(row: dict, work: Work, peer: str, on: str) -> bool:
    return (row["work"], row["peer"], row["gpu"]) == (work.name, peer, on)


def _one(work: Work, peer: str, folder: Path, left: float | None) -> tuple[dict, float]:
    """The figures of one process, and its seconds."""
    log = folder / f"{work.name}-{peer}.log".replace("/", "_")
    return figures_of("lowprec.bench.train.worker", [work.name, peer, str(folder.resolve())], peer, log, left)


def _in_words(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row.get('error', '')}"
    memory = f", {row['peak_gb']:.2f} GB" if row.get("peak_gb") is not None else ""
    return f"{row['tokens_per_second']:,.0f} tokens/s, {row['step_ms_p50']:,.1f} ms a step{memory}"


def _write_table(results: Path) -> str:
    rows = read(results)
    text = markdown(rows)
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(rows, results.with_suffix(".png"))
    return text
