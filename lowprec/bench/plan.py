"""``lowprec bench plan``: what plans predict beside what steps take, over a grid of shapes, methods and stores.

One process takes all cells, since starting one takes longer than measuring one; between them the device's memory and
cuBLAS's workspaces are given back. What is predicted was fitted to none of these cells.
"""

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lowprec.bench.train.ours import recipe_of
from lowprec.bench.train.ours import run as measure
from lowprec.bench.train.works import LLAMA_1B, LLAMA_8B, NO_GRAPHS, SMOL_135M, TINY, Work
from lowprec.errors import UserError
from lowprec.layers.decode_buffer import release_decode_buffers
from lowprec.machine import Machine
from lowprec.plan.predict import Planner
from lowprec.plan.run import find_machine
from lowprec.plan.settle import settle_on

SHAPES: dict[str, dict[str, Any]] = {"135m": SMOL_135M, "1b": LLAMA_1B, "8b": LLAMA_8B, "tiny": TINY}
BATCHES: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "135m": {"full": ((1, 512), (8, 512), (2, 2048), (8, 2048), (1, 4096), (4, 4096)), "lora": ((8, 512), (2, 4096))},
    "1b": {"full": ((1, 512), (4, 2048), (2, 4096)), "lora": ((8, 512), (4, 2048))},
    "8b": {"lora": ((1, 512), (2, 2048), (1, 4096))},
}
"""(rows, length) of every shape with full training, and with adapters."""
BY_THE_HOST = {"135m": (8, 512), "1b": (4, 2048), "8b": (2, 2048)}
"""(rows, length) at which the host launches layers kernel by kernel, too: a slow one then decides the time."""
ROOM = 1e6
"""GiB: a cap that is none, at which the benchmark gives back what building the model left."""
BOUNDS = {"allocated": (0.05, 0.10), "reserved": (0.10, 0.10), "step_ms": (0.20, None)}
"""Largest error of 9 in 10 cells, and of all."""


def grid() -> dict[str, Work]:
    """The cells by name."""
    works = []

    def add(shape: str, recipe: str, rows: int, length: int, *overrides: str) -> None:
        words = [item.rpartition(".")[2] for item in overrides]
        name = " ".join([shape, recipe, f"{rows}x{length}", *words])
        fixed = ("train.gradient_accumulation_steps=1", f"data.max_length={length}")
        one = Work(name, SHAPES[shape], rows, length, recipe, (*fixed, *overrides), cap_gib=ROOM, warmup=4, timed=7)
        works.append(one)

    def with_and_without(shape: str, batches: Iterable[tuple[int, int]]) -> Iterator[tuple[Any, ...]]:
        for batch in batches:
            yield (batch,)
            if batch == BY_THE_HOST[shape]:
                yield batch, NO_GRAPHS

    for shape, methods in BATCHES.items():
        for policy in ("none", "full"):
            keeps = f"train.gradient_checkpointing={policy}"
            for batch, *more in with_and_without(shape, methods.get("full", ())):
                add(shape, "full", *batch, keeps, *more)
            for batch, *more in with_and_without(shape, methods["lora"]):
                add(shape, "lora", *batch, keeps, *more)
                add(shape, "qlora_nf4", *batch, keeps, *more, "weights.product=bf16")
                if policy == "full" or shape != "8b":
                    add(shape, "lora", *batch, keeps, *more, "weights=fp8")
    none, full = "train.gradient_checkpointing=none", "train.gradient_checkpointing=full"
    for shape in ("135m", "1b"):
        add(shape, "full", 4, 1024, none, "state_store=cpu")
        add(shape, "full", 4, 1024, none, "state_store=ssd", "train.max_grad_norm=null")
        add(shape, "full", 4, 1024, full, "optimizer.state_dtype=int8", "optimizer.master=split")
        add(shape, "full", 4, 1024, none, "weights=int8_hadamard")
        add(shape, "full", 4, 1024, none, "train.max_grad_norm=null")
    for policy in ("selective", "offload"):
        add("8b", "lora", 2, 2048, f"train.gradient_checkpointing={policy}")
    add("8b", "lora", 2, 2048, full, "weights=int8_hadamard")
    add("8b", "qlora_nf4", 4, 2048, full, "weights.product=int8")
    return {work.name: work for work in works}


def bench_plan(
    folder: str | Path,
    *,
    works: dict[str, Work] | None = None,
    names: Iterable[str] = (),
    minutes: float | None = None,
    tell: Callable[[str], None] = print,
) -> str:
    """Measure the cells that ``folder`` has no row of yet, and write ``bench_plan.jsonl`` and ``bench_plan.md`` there.

    Args:
        names: parts of cells' names; empty takes all.
        minutes: end after that long; called again, it goes on.

    Returns:
        The table.

    Raises:
        UserError: there is no GPU (on a processor only cells of the shape ``tiny`` are measured).
    """
    begin, folder = time.monotonic(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device, cells, names = torch.device("cuda" if torch.cuda.is_available() else "cpu"), works or grid(), list(names)
    chosen = {name: work for name, work in cells.items() if not names or any(part in name for part in names)}
    if not chosen:
        example = next(iter(cells))
        raise UserError(f"--works {','.join(names)}: no cell has that in its name. A name is {example!r}.")
    if device.type == "cpu" and any(work.shape is not TINY for work in chosen.values()):
        raise UserError("lowprec bench plan needs a GPU: it measures what plans predict of one.")
    machine, notes = find_machine(None)
    for note in notes:
        tell(note)
    results, planners = folder / "bench_plan.jsonl", {}
    done = {row["cell"] for row in read(results) if not row.get("error")}  # what failed is tried again
    left = [work for name, work in chosen.items() if name not in done]
    for number, work in enumerate(left, 1):
        if minutes is not None and time.monotonic() - begin > minutes * 60:
            tell(f"{len(left) - number + 1} cells are left: the same command goes on.")
            break
        key = json.dumps(work.shape)
        if key not in planners:
            planners[key] = _planner(work, machine)
        row = {"cell": work.name, "memory_gib": _memory_gib(device)}
        row |= predicted(work, planners[key], folder, device) | _measured(work, folder, device)
        with results.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(row))  # on a line of its own, whatever a kill has left of the one before
        tell(f"{number}/{len(left)} {_line(row)}")
    table = markdown(read(results), device, machine)
    (folder / "bench_plan.md").write_text(table, encoding="utf-8")
    return table


def read(results: Path) -> list[dict[str, Any]]:
    """The last row of every cell so far; a line that a kill has cut off is left out."""
    rows = {}
    for line in results.read_text(encoding="utf-8").splitlines() if results.is_file() else ():
        with suppress(ValueError):
            row = json.loads(line)
            rows[row["cell"]] = row
    return list(rows.values())


def _planner(work: Work, machine: Machine | None) -> Planner:
    from transformers import AutoConfig

    return Planner(AutoConfig.for_model(**work.shape), machine)


def predicted(work: Work, planner: Planner, folder: Path, device: torch.device) -> dict[str, Any]:
    """The prediction of the cell on this device, in GB of 1e9 bytes as PyTorch's counters are given."""
    recipe = recipe_of(work, folder, device)
    recipe = settle_on(recipe, device, config=planner.config).of(recipe)
    begin = time.perf_counter()
    found = planner.predict(recipe)
    return {
        "predicted_allocated_gb": found.peak.allocated / 1e9,
        "predicted_reserved_gb": found.reserved / 1e9,
        "predicted_step_ms": None if found.time is None else found.time.total_ms,
        "predicted_parts_gb": {name: size / 1e9 for name, size in found.parts.items()},
        "predicted_in_s": time.perf_counter() - begin,
    }


def _measured(work: Work, folder: Path, device: torch.device) -> dict[str, Any]:
    try:
        figures = measure(work, folder, device)
    except torch.OutOfMemoryError:
        figures = {"out_of_memory": True}
    except Exception as error:  # the other cells are worth their time
        figures = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        release_decode_buffers()
        # The first collection takes CUDA graphs apart, the second what they held: the packed weights of an NF4 model
        # stood through the next cell's steps (3.6 GB of the 8B shape on an H100).
        for _ in range(2):
            gc.collect()
        if device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
    names = {"peak_gb": "allocated_gb", "reserved_gb": "reserved_gb", "step_ms_p50": "step_ms"}
    kept = (*names, "out_of_memory", "error")
    return {"out_of_memory": False} | {names.get(k, k): figures[k] for k in kept if k in figures}


def _memory_gib(device: torch.device) -> float | None:
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


def misses(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A line for every cell that is further off than 9 in 10 may be, or ran out of memory where the plan fits."""
    found = []
    for row in rows:
        told = [f"{name} {error:+.1%}" for name, error in errors(row).items() if abs(error) > BOUNDS[name][0]]
        total = sum(row.get("predicted_parts_gb", {}).values()) * 1e9 / 2**30
        if row["out_of_memory"] and row.get("memory_gib") and total <= row["memory_gib"]:
            told.append(f"out of memory, predicted to fit ({total:.1f} of {row['memory_gib']:.1f} GiB)")
        if row.get("error"):
            told.append(f"not measured: {row['error']}")
        if told:
            found.append(f"{row['cell']}: {', '.join(told)}")
    return found


def errors(row: dict[str, Any]) -> dict[str, float]:
    """Predicted over measured, minus 1, of what both have."""
    pairs = {name: f"{name}_gb" for name in ("allocated", "reserved")} | {"step_ms": "step_ms"}
    return {
        name: row[f"predicted_{key}"] / row[key] - 1
        for name, key in pairs.items()
        if row.get(key) and row.get(f"predicted_{key}")
    }


def markdown(rows: list[dict[str, Any]], device: torch.device, machine: Machine | None) -> str:
    """The figures, and how many cells keep the bounds."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a processor"
    rates = (
        "no rates"
        if machine is None
        else f"the {'measured' if machine.measured else 'datasheet'} rates of {machine.name}"
    )
    lines = [
        f"# Plans against {where}",
        "",
        f"PyTorch {torch.__version__}; times follow from {rates}. GB are 1e9 bytes.",
        "",
    ]
    for name, (most, worst) in BOUNDS.items():
        found = sorted(abs(errors(row)[name]) for row in rows if name in errors(row))
        if found:
            within = sum(error <= most for error in found) / len(found)
            lines.append(
                f"- {name}: {within:.0%} of {len(found)} cells within {most:.0%}, median {found[len(found) // 2]:.1%}, "
                f"worst {found[-1]:.1%}" + ("" if worst is None else f" (all within {worst:.0%}: {found[-1] <= worst})")
            )
    head = "| cell | allocated | predicted | | reserved | predicted | | step, ms | predicted | |"
    lines += ["", head, "|" + "---|" * 10]
    missed = [f"- {line}" for line in misses(rows)] or ["None."]
    return "\n".join([*lines, *(_line(row) for row in rows), "", "## Misses", "", *missed]) + "\n"


def _line(row: dict[str, Any]) -> str:
    if row["out_of_memory"]:
        return f"| {row['cell']} | out of memory | {row['predicted_allocated_gb']:.2f} |" + " |" * 7
    if row.get("error"):
        return f"| {row['cell']} | failed | {row['predicted_allocated_gb']:.2f} |" + " |" * 7
    error, cells = errors(row), [row["cell"]]
    for name, key, digits in (
        ("allocated", "allocated_gb", 2),
        ("reserved", "reserved_gb", 2),
        ("step_ms", "step_ms", 1),
    ):
        values = [row.get(key), row.get(f"predicted_{key}")]
        cells += ["" if value is None else f"{value:.{digits}f}" for value in values]
        most = BOUNDS[name][0]
        cells.append("" if name not in error else f"{error[name]:+.1%}{' **miss**' if abs(error[name]) > most else ''}")
    return "| " + " | ".join(cells) + " |"
