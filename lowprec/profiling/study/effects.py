"""What changing one factor does: paired differences between cells that differ in nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowprec.profiling.study.cells import FACTORS, PLAIN

Rows = Sequence[dict[str, Any]]
RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Of going from one level of a factor to another, everything else the same."""

    factor: str
    before: Any
    after: Any
    pairs: int
    """In which both cells ran."""
    lost: int
    """In which memory sufficed for the first level and not for the second."""
    speed: tuple[float, float, float] | None
    """Tokens/s, second over first: geometric mean, and the ends of its 95 % interval."""
    memory_gib: tuple[float, float, float] | None
    """Peak, second minus first: mean, and the ends of its 95 % interval."""


def effects(rows: Rows) -> list[Effect]:
    """Of every factor of the plain stack, from each level to the next and from the first to the last."""
    plain = [row for row in rows if row["stack"] == PLAIN]
    found = []
    for factor in FACTORS:
        levels = list(dict.fromkeys(row[factor] for row in plain))
        levels = sorted(levels) if factor in ("batch", "length") else _in_order(factor, levels)
        steps = list(zip(levels, levels[1:], strict=False))
        if len(levels) > 2:
            steps.append((levels[0], levels[-1]))
        found += [effect(plain, factor, before, after) for before, after in steps]
    return found


def effect(rows: Rows, factor: str, before: Any, after: Any) -> Effect:
    """Pair the cells that differ in ``factor`` alone."""
    others = [name for name in FACTORS if name != factor]
    by_rest = {tuple(row[name] for name in others): row for row in rows if row[factor] == after}
    pairs, lost = [], 0
    for row in rows:
        if row[factor] != before or row["status"] != "ok":
            continue
        other = by_rest.get(tuple(row[name] for name in others))
        if other is not None and other["status"] == "ok":
            pairs.append((row, other))
        elif other is not None and other["status"] == "out_of_memory":
            lost += 1
    logs = np.array([np.log(b["tokens_per_second"] / a["tokens_per_second"]) for a, b in pairs])
    gib = np.array([b["peak_vram_gib"] - a["peak_vram_gib"] for a, b in pairs if a.get("peak_vram_gib")])
    speed = interval(logs)
    return Effect(
        factor=factor,
        before=before,
        after=after,
        pairs=len(pairs),
        lost=lost,
        speed=None if speed is None else tuple(float(np.exp(value)) for value in speed),  # type: ignore[arg-type]
        memory_gib=interval(gib),
    )


def interval(values: np.ndarray) -> tuple[float, float, float] | None:
    """Mean and 95 % interval, by resampling the pairs; None of nothing."""
    if not len(values):
        return None
    chance = np.random.default_rng(0)
    means = values[chance.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def _in_order(factor: str, levels: list[Any]) -> list[Any]:
    wanted = {
        "optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
        "dtype": ("fp32", "fp16", "bf16"),
        "weights": ("lora", "qlora"),
    }[factor]
    return sorted(levels, key=wanted.index)
