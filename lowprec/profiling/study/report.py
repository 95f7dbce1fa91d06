"""The study's CSV, plots and page, from its rows."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lowprec.profiling.study.cells import OWN, PAPER, PLAIN, SHAPES
from lowprec.profiling.study.claims import change, verdicts
from lowprec.profiling.study.effects import Effect, effects
from lowprec.profiling.study.plots import plot_effects, plot_memory
from lowprec.profiling.study.run import ABOUT, command_of, read_rows, shape_of

Rows = Sequence[dict[str, Any]]
COLUMNS = (
    "key", "stack", "weights", "optimizer", "dtype", "batch", "length", "status", "tokens_per_second",
    "step_time_ms_p50", "step_time_ms_p90", "peak_vram_gib", "peak_reserved_gib", "energy_j_per_token",
    "energy_source", "warmup", "steps", "seconds", "error",
)  # fmt: skip
CSV, PAGE = "cells.csv", "consumer_gpu.md"
MEMORY_PNG, EFFECTS_PNG = "consumer_gpu_memory.png", "consumer_gpu_effects.png"


def write_report(folder: Path) -> list[Path]:
    """Write ``cells.csv``, two plots and the page, which is ready for docs/benchmarks; returns their paths."""
    rows = read_rows(folder)
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    with (folder / CSV).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    found = effects(rows)
    limit = shape_of(about).limit_gib
    plot_memory(rows, limit, folder / MEMORY_PNG)
    plot_effects(found, folder / EFFECTS_PNG)
    (folder / PAGE).write_text(page(rows, found, about), encoding="utf-8")
    return [folder / name for name in (CSV, MEMORY_PNG, EFFECTS_PNG, PAGE)]


def page(rows: Rows, found: Sequence[Effect], about: dict[str, Any]) -> str:
    """The page: what was run where, the paper's rows, the effects, the claims, this toolkit's schemes."""
    shape = shape_of(about)
    gpus = about["hardware"]["gpus"]
    place = gpus[0]["name"] if gpus else f"a processor with {about['hardware']['cores']} cores"
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "out_of_memory", "failed")}
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    compares = (
        "**Memory and ratios can be compared with the paper; tokens/s are those of this machine.**"
        if gpus and shape is SHAPES["qwen2.5-1.5b"]
        else "**Nothing here can be compared with the paper: this shows how the study works.**"
    )
    limit = shape.limit_on(bool(gpus))
    limited = "" if limit is None else f", whose memory was limited to {limit:g} GiB"
    parts = [
        f"# LoRA and QLoRA under {shape.limit_gib:g} GiB, one factor at a time ({about['date']})",
        f"The study of arXiv:2509.12229 (Qwen2.5-1.5B on an RTX 4060), repeated with a full factorial on {place}"
        f"{limited}. {compares} Shape {about['shape']}, random weights; batch, length, optimizer, dtype and base are "
        "varied; LoRA of rank 16 on all linear layers and gradient checkpointing are the same for all; every token is "
        f"trained, none is padding. {about['warmup']} steps of warm-up, {about['steps']} measured. Each cell was run "
        "once.",
        f"{len(rows)} cells: {count['ok']} ran, {count['out_of_memory']} ran out of memory, {count['failed']} failed.",
        f"{versions}. Repeat: `{command_of(about)}`; all figures are in {CSV}.",
        "## Which of the paper's claims hold",
        _table(
            ["claim", "when one factor changes", "measured"], ((v.claim, v.verdict, v.measured) for v in verdicts(rows))
        ),
        "A claim holds where the 95 % interval of the paired ratios lies on its side of 1 and reaches its size, holds "
        "in part where it lies on its side alone, and is not decided where the interval holds both its size and 1, or "
        "where fewer than two pairs ran. The paper compares runs that differ in batch, length, "
        "optimizer and dtype at once.",
        "## The effect of each factor",
        f"![Effect of each factor]({EFFECTS_PNG})",
        _effects_table(found),
        "Pairs of cells that differ in that factor alone; means of the pairs with 95 % intervals by resampling. Lost: "
        "the first level fits, the second does not.",
        "## Throughput against memory",
        f"![Throughput against memory]({MEMORY_PNG})",
        "## The paper's three rows",
        _paper_table(rows),
        "Which of the paper's runs were quantised is not known here, so each is run with both bases.",
        "## This toolkit's own schemes",
        _rows_table([row for row in rows if row["stack"] == OWN]),
        "## Cells that ran out of memory",
        _list(row["key"] for row in rows if row["status"] == "out_of_memory"),
    ]
    failed = [f"{row['key']}: {row.get('error', '')}" for row in rows if row["status"] == "failed"]
    if failed:
        parts += ["## Cells that failed", _list(failed)]
    return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(str(value) for value in row)} |" for row in rows]
    return "\n".join(lines) if len(lines) > 2 else "None was run."


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "None."


def _effects_table(found: Sequence[Effect]) -> str:
    def gib(found: Effect) -> str:
        if found.memory_gib is None:
            return ""
        mean, low, high = (_told(value, 2, "+") for value in found.memory_gib)
        return mean if found.pairs < 2 else f"{mean} ({low} to {high})"

    return _table(
        ["factor", "from", "to", "tokens/s", "peak, GiB", "pairs", "lost"],
        ((e.factor, e.before, e.after, change(e), gib(e), e.pairs, e.lost) for e in found),
    )


def _paper_table(rows: Rows) -> str:
    told = []
    for paper in PAPER:
        for row in rows:
            same = all(row[name] == paper[name] for name in ("optimizer", "dtype", "batch", "length"))
            if same and row["stack"] == PLAIN:
                told.append(
                    (paper["run"], row["weights"], row["optimizer"], row["dtype"], f"{row['batch']} x {row['length']}",
                     paper["tokens_per_second"], _number(row, "tokens_per_second", 0),
                     f"{float(str(paper['peak_mb'])) / 1024:.2f}", _number(row, "peak_vram_gib", 2))
                )  # fmt: skip
    heads = [
        "run",
        "base",
        "optimizer",
        "dtype",
        "batch x length",
        "tokens/s, paper",
        "here",
        "peak GiB, paper",
        "here",
    ]
    return _table(heads, told)


def _rows_table(rows: Rows) -> str:
    return _table(
        ["weights", "optimizer", "dtype", "batch x length", "tokens/s", "step, ms", "peak, GiB", "J a token"],
        (
            (row["weights"], row["optimizer"], row["dtype"], f"{row['batch']} x {row['length']}",
             _number(row, "tokens_per_second", 0), _number(row, "step_time_ms_p50", 1),
             _number(row, "peak_vram_gib", 2), _number(row, "energy_j_per_token", 4))
            for row in rows
        ),
    )  # fmt: skip


def _number(row: dict[str, Any], name: str, places: int) -> str:
    if row["status"] != "ok":
        return str(row["status"]).replace("_", " ")
    value = row.get(name)
    return "" if value is None else _told(value, places)


def _told(value: float, places: int, sign: str = "") -> str:
    """With so many decimals; of what would vanish in them, two digits."""
    return f"{value:{sign}.2g}" if value and abs(value) < 10**-places else f"{value:{sign},.{places}f}"
