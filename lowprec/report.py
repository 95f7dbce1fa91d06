"""``report.json``, the table at the end of a run, and ``loss.png``."""

import importlib.metadata
import os
import platform
import resource
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lowprec import __version__
from lowprec.layers.host_embedding import host_tables
from lowprec.machine.profile import processor
from lowprec.profiling.phases import PHASES

GIB = 2**30
_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "triton",
    "liger-kernel",
)


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on; packages that are missing are left out."""
    found = {"lowprec": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine: processor, cores, memory in GiB, and every CUDA device."""
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": [
            {"name": d.name, "vram_gib": round(d.total_memory / GIB, 1), "sm": f"{d.major}.{d.minor}"} for d in devices
        ],
        "cuda": torch.version.cuda,
    }


def dtypes(model: nn.Module, optimizer: torch.optim.Optimizer, compute: torch.dtype) -> dict[str, Any]:
    """Number of elements stored in each dtype: parameters, those that train, optimizer states; and what computes.

    A 4-bit weight counts as the uint8 elements that hold it.
    """
    states = (
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    )
    return {
        "parameters": _elements([*model.parameters(), *host_tables(model)]),
        "trained_parameters": _elements(p for p in model.parameters() if p.requires_grad),
        "optimizer_states": _elements(state for state in states if state.numel() > 1),
        "compute": _name(compute),
    }


def peak_memory() -> dict[str, float]:
    """Peak GiB of this process: ``peak_ram_gib`` resident, ``peak_vram_gib`` allocated by PyTorch (0 on the CPU)."""
    vram = 0.0
    if torch.cuda.is_available():  # as torch.cuda.max_memory_allocated, in 24 instead of 146 us of the host
        vram = torch.cuda.memory_stats_as_nested_dict()["allocated_bytes"]["all"]["peak"] / GIB
    return {
        "peak_vram_gib": round(vram, 3),
        "peak_ram_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3),
    }


def speed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the steps of this process, the first (which warms up) left out where there are others.

    Returns:
        ``tokens_per_second`` (trained tokens), ``all_tokens_per_second`` (prompts too, no padding),
        ``step_time_ms_p50`` and ``step_time_ms_p90``. Empty where no step was taken.
    """
    steps = [row for row in rows if "loss" in row]
    steps = steps[1:] if len(steps) > 1 else steps
    if not steps:
        return {}
    times = sorted(row["step_time_ms"] for row in steps)
    return {
        "tokens_per_second": round(statistics.median(row["tokens_per_second"] for row in steps), 1),
        "all_tokens_per_second": round(statistics.median(row["all_tokens_per_second"] for row in steps), 1),
        "step_time_ms_p50": round(statistics.median(times), 1),
        "step_time_ms_p90": round(times[min(int(0.9 * len(times)), len(times) - 1)], 1),
    }


def phases(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``phases_ms``: medians of the times by phase, over the same steps as ``speed``. Empty where none were taken."""
    steps = [row for row in rows if "forward_ms" in row]
    steps = steps[1:] if len(steps) > 1 else steps
    names = [f"{name}_ms" for name in (*PHASES, "disk_wait", "host_sync")]
    medians = {
        name.removesuffix("_ms"): round(statistics.median(row.get(name, 0.0) for row in steps), 2)
        for name in names
        if any(name in row for row in steps)
    }
    return {"phases_ms": medians} if medians else {}


def print_summary(report: dict[str, Any], folder: Path, console: Console) -> None:
    """The short table that ends a run."""
    steps = "1 step" if report["steps"] == 1 else f"{report['steps']:,} steps"
    title = f"{report['recipe']}: {report['status']} after {steps}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    before, after = report.get("eval_loss_before"), report.get("eval_loss_after")
    if before is not None and after is not None:
        table.add_row("held-out loss", f"{before:.3f} -> {after:.3f}  ({100 * (after / before - 1):+.1f} %)")
    if report.get("tokens_per_second") is not None:
        speeds = f"{report['tokens_per_second']:,.0f} ({report['all_tokens_per_second']:,.0f} with prompts)"
        table.add_row("trained tokens/s", speeds)
        table.add_row("step time, median", f"{report['step_time_ms_p50']:,.0f} ms")
    if "phases_ms" in report:
        table.add_row("of it", shares(report["phases_ms"]))
    if report["peak_vram_gib"]:
        table.add_row("peak VRAM", f"{report['peak_vram_gib']:.2f} GiB")
    table.add_row("peak RAM", f"{report['peak_ram_gib']:.2f} GiB")
    for name, text in _footprint(report["footprint"]):
        table.add_row(name, text)
    table.add_row("linear layers", ", ".join(f"{count} {scheme}" for scheme, count in report["layers"].items()))
    table.add_row("trained parameters", _counts(report["dtypes"]["trained_parameters"]))
    table.add_row("optimizer states", _states(report))
    table.add_row("computed in", report["dtypes"]["compute"])
    table.add_row("run folder", str(folder))
    console.print(table)


def shares(phases_ms: dict[str, float]) -> str:
    """``backward 61 %, forward 30 %, ...``: the parts of a step, the largest first."""
    parts = {name: phases_ms[name] for name in PHASES if phases_ms.get(name)}
    total = sum(parts.values())
    return ", ".join(f"{name} {ms / total:.0%}" for name, ms in sorted(parts.items(), key=lambda part: -part[1]))


def _footprint(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows on energy and the card's life; none of what is not known."""
    rows = []
    if found["energy_kwh"] is not None:
        how = {"nvml": "the card's counter", "board limit": "an estimate by its power limit", "rapl": "the processor's"}
        rows.append(("energy", f"{found['energy_kwh']:.3g} kWh ({how[found['energy_source']]})"))
        grid = f"{found['grid_g_co2e_per_kwh']:g} g a kWh"
        rows.append(("CO2e of it", f"{found['co2e_g']:.3g} g at {grid} (train.grid_g_co2e_per_kwh)"))
    if found["gpu_hours"] > 0:
        share, grams = 100 * found["card_life_share"], found["embodied_co2e_g"]
        rows.append(
            ("of a card's life", f"{share:.2g} % in {found['gpu_hours']:.3g} h, {grams:.2g} g CO2e of its making")
        )
    return rows


def plot_loss(rows: list[dict[str, Any]], target: Path, title: str) -> None:
    """Training loss of every step and held-out loss, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#7aa6d8", linewidth=1.2, label="training, each step")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c1440e", marker="o", markersize=4, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)


def _states(report: dict[str, Any]) -> str:
    states = report.get("optimizer")
    if states is None:
        return _counts(report["dtypes"]["optimizer_states"])
    master = f", master {states['master']}" if "bfloat16" in report["dtypes"]["trained_parameters"] else ""
    places = {"gpu": "beside the weights", "cpu": "in host memory", "ssd": "on the disk"}
    return f"{states['states_gib']:.3g} GiB {places[states['state_store']]}, {states['state_dtype']}{master}"


def _elements(tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[_name(tensor.dtype)] += tensor.numel()
    return dict(counts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _counts(elements: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {dtype}" for dtype, count in elements.items()) or "none"
