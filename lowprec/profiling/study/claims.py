"""What the paper claims, held against cells that differ in one factor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowprec.profiling.study.cells import PLAIN
from lowprec.profiling.study.effects import Effect, effect

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One claim."""

    claim: str
    verdict: str
    """holds, holds in part, does not hold, not decided."""
    measured: str


def verdicts(rows: Rows) -> list[Verdict]:
    """Of all claims about one factor."""
    plain = [row for row in rows if row["stack"] == PLAIN]
    paged = effect(plain, "optimizer", "adamw", "paged_adamw_8bit")
    bf16 = effect(plain, "dtype", "fp16", "bf16")
    return [
        Verdict(
            claim="Paged 8-bit AdamW is 25 % faster than AdamW (628 against 500 tokens/s)",
            verdict=_verdict(paged, claimed=1.25),
            measured=_told(paged),
        ),
        Verdict(
            claim="bf16 is slower than fp16 (360 against 628 tokens/s, 43 % less)",
            verdict=_verdict(bf16, claimed=360.2 / 628.1),
            measured=_told(bf16),
        ),
        _fits(plain),
    ]


def _verdict(found: Effect, claimed: float) -> str:
    """A claim of a ratio: its direction first, then its size. One pair has no interval, so it decides nothing."""
    if found.speed is None or found.pairs < 2:
        return "not decided"
    _, low, high = found.speed
    right_way = low > 1 if claimed > 1 else high < 1
    reaches = high >= claimed if claimed > 1 else low <= claimed
    if right_way:
        return "holds" if reaches else "holds in part"
    wrong_way = high < 1 if claimed > 1 else low > 1
    return "not decided" if reaches and not wrong_way else "does not hold"


def _told(found: Effect) -> str:
    if found.speed is None:
        return "no two cells that differ in this alone ran"
    return f"{change(found)}, {found.pairs} pair{'s' if found.pairs > 1 else ''}"


def change(found: Effect) -> str:
    """Of tokens/s in percent, with its interval where there are pairs enough for one."""
    if found.speed is None:
        return ""
    mean, low, high = (f"{100 * (value - 1):+.1f}" for value in found.speed)
    return f"{mean} %" if found.pairs < 2 else f"{mean} % ({low} to {high})"


def _fits(plain: Rows) -> Verdict:
    """The paper's second run, with either base."""
    longest = max((row["length"] for row in plain), default=0)
    wanted = [row for row in plain if row["length"] == longest and row["optimizer"] == "paged_adamw_8bit"]
    told = []
    for row in sorted(wanted, key=lambda row: (row["weights"], row["dtype"], row["batch"])):
        peak = f" ({row['peak_vram_gib']:.2f} GiB)" if row["status"] == "ok" and row.get("peak_vram_gib") else ""
        told.append(f"{row['weights']} {row['dtype']} batch {row['batch']}: {row['status'].replace('_', ' ')}{peak}")
    two = [row["status"] == "ok" for row in wanted if row["batch"] == 2 and row["status"] != "failed"]
    verdict = "not decided" if not two else "holds" if all(two) else "holds in part" if any(two) else "does not hold"
    return Verdict(
        claim=f"Length {longest} fits under the limit", verdict=verdict, measured="; ".join(told) or "no cell"
    )
