"""The study's two plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lowprec.profiling.study.cells import PLAIN
from lowprec.profiling.study.effects import Effect

COLOURS = {"lora": "#3b6fb0", "qlora": "#d9822b", "bf16": "#3f9c95", "nf4": "#c8453f", "fp8": "#4f9145",
           "int8_hadamard": "#9a5f93"}  # fmt: skip
MARKERS = {"adamw": "o", "adamw_8bit": "s", "paged_adamw_8bit": "^"}


def plot_memory(rows: Sequence[dict[str, Any]], limit_gib: float, target: Path) -> None:
    """Tokens/s against peak memory, a mark a cell; those that ran out of memory stand at the limit, below."""
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seen = set()
    for row in rows:
        if row["status"] != "ok" or not row.get("peak_vram_gib"):
            continue
        own = row["stack"] != PLAIN
        label = f"{'lowprec ' if own else ''}{row['weights']}, {row['optimizer']}"
        axes.plot(
            row["peak_vram_gib"], row["tokens_per_second"], MARKERS.get(row["optimizer"], "o"),
            color=COLOURS.get(row["weights"], "#62656b"), markersize=4 + 1.5 * row["batch"], alpha=0.8,
            markerfacecolor="none" if row["dtype"] != "bf16" else None, label=None if label in seen else label,
        )  # fmt: skip
        seen.add(label)
    ran_out = sum(row["status"] == "out_of_memory" for row in rows)
    axes.axvline(limit_gib, color="#c8453f", linestyle="--", linewidth=1)
    across = axes.get_xaxis_transform()
    axes.text(limit_gib, 0.02, f" limit; {ran_out} cells ran out", transform=across, color="#c8453f", rotation=90,
              ha="right", va="bottom", fontsize=8)  # fmt: skip
    axes.set(
        xlabel="peak of allocated memory, GiB", ylabel="tokens/s", title="Larger marks: larger batches; filled: bf16"
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if seen:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(target, dpi=150)


def plot_effects(found: Sequence[Effect], target: Path) -> None:
    """What each change of one factor does to tokens/s and to the peak, with 95 % intervals."""
    known = [effect for effect in found if effect.speed is not None]
    figure = Figure(figsize=(9, 1.2 + 0.42 * max(len(known), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2, sharey=True)
    names = [f"{e.factor}: {e.before} → {e.after} ({e.pairs})" for e in known]
    for place, effect in enumerate(known):
        assert effect.speed is not None
        _interval(speed, place, tuple(100 * (value - 1) for value in effect.speed), "#3b6fb0")
        if effect.memory_gib is not None:
            _interval(memory, place, effect.memory_gib, "#d9822b")
    for axes, label in ((speed, "tokens/s, %"), (memory, "peak, GiB")):
        axes.axvline(0, color="#62656b", linewidth=1)
        axes.set(xlabel=label)
        axes.grid(axis="x", alpha=0.3)
    speed.set_yticks(range(len(names)), names)
    speed.invert_yaxis()
    figure.savefig(target, dpi=150)


def _interval(axes: Any, place: int, value: tuple[float, ...], colour: str) -> None:
    mean, low, high = value
    axes.plot([low, high], [place, place], color=colour, linewidth=2)
    axes.plot(mean, place, "o", color=colour, markersize=5)
