"""The results of ``lowprec bench ssd --works`` as tables for people, with what follows from them."""

import statistics
from typing import Any

from lowprec.bench.ssd_training.works import KNOWN

STEPS = (
    "work", "by", "step s, p50 [of each]", "read + written GB", "GB/s", "of raw mixed: before, after, their mean",
    "disk s at the mean", "compute s", "step / the larger", "not hidden s", "of DeepSpeed's step",
)  # fmt: skip
MEMORY = (
    "work",
    "by",
    "GPU peak GB",
    "beyond weights and activations",
    "host growth GB",
    "forward, backward, update s",
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The newest result of every run, by GPU: steps, memory, the disk's raw rates, and what is to be reached."""
    if not rows:
        return "No results yet.\n"
    parts = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        newest = {(row["work"], row["by"]): row for row in rows if row["gpu"] == gpu and row["work"] in KNOWN}
        mine = [newest[name, by] for name in KNOWN for by in ("lowprec", "deepspeed") if (name, by) in newest]
        good = [row for row in mine if row["status"] == "ok"]
        numbers = mine[-1]["versions"] | {row["by"]: row["version"] for row in good if "version" in row}
        parts += [f"## {gpu}", " ".join(f"{name} {number}" for name, number in numbers.items()), ""]
        parts += [_line(STEPS), _line(["---"] * len(STEPS)), *(_line(_step(row, newest)) for row in good), ""]
        parts += [_line(MEMORY), _line(["---"] * len(MEMORY)), *(_line(_memory(row)) for row in good), ""]
        parts += [f"- {row['work']} by {row['by']}: {row['status']}: {row.get('error', '')}" for row in mine
                  if row["status"] != "ok"]  # fmt: skip
        parts += [_raw(row) for row in good if "raw" in row]
        parts += ["", *(f"- {name}: {KNOWN[name].target}." for name in dict.fromkeys(row["work"] for row in mine)), ""]
    return "\n".join(parts)


def facts(row: dict[str, Any]) -> dict[str, float]:
    """What follows from a run's steps after the first: bytes, their rate, and its shares of the raw disk's.

    ``disk_s`` is the time that the bytes of the median step need at the mean of the raw rates before and after.
    """
    later = row["steps"][1:]
    step_s = row["step_s_p50"]
    found = {
        "read_gb": statistics.median(step["read_gb"] for step in later),
        "written_gb": statistics.median(step["written_gb"] for step in later),
    }
    if "raw" in row:
        moved_gb = found["read_gb"] + found["written_gb"]
        rates = _raw_rates(row["raw"])
        found["gb_s"] = moved_gb / step_s
        found |= {f"of_{name}": found["gb_s"] / rate for name, rate in rates.items()}
        found["disk_s"] = moved_gb / rates["mean"]
    if "compute_s" in row:
        found["of_larger"] = step_s / max(row["compute_s"], found.get("disk_s", 0.0))
        found["not_hidden_s"] = step_s - row["compute_s"]
    return found


def _raw_rates(raw: dict[str, Any]) -> dict[str, float]:
    before, after = (raw[when]["mixed_gb_s"] for when in ("before", "after"))
    return {"before": before, "after": after, "mean": (before + after) / 2}


def _step(row: dict[str, Any], newest: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    found = facts(row)
    each = ", ".join(f"{step['step_s']:.2f}" for step in row["steps"][1:])
    peers = [
        other["step_s_p50"]
        for (name, by), other in newest.items()
        if by == "deepspeed" and other["status"] == "ok" and KNOWN[row["work"]].same_peer(KNOWN[name])
    ]
    share = f"{row['step_s_p50'] / peers[0]:.0%}" if peers and row["by"] == "lowprec" else ""
    return [
        row["work"],
        row["by"],
        f"{row['step_s_p50']:.2f} [{each}]",
        f"{found['read_gb']:.2f} + {found['written_gb']:.2f}",
        _number(found.get("gb_s")),
        ", ".join(f"{found[f'of_{name}']:.0%}" for name in ("before", "after", "mean")) if "raw" in row else "",
        _number(found.get("disk_s")),
        _number(row.get("compute_s")),
        _number(found.get("of_larger")),
        _number(found.get("not_hidden_s")),
        share,
    ]


def _memory(row: dict[str, Any]) -> list[str]:
    peak, bare, last = row["peak_gb"], row.get("weights_and_activations_gb"), row["steps"][-1]
    parts = ", ".join(_number(last.get(name)) for name in ("forward_s", "backward_s", "update_s"))
    beyond = _number(None if peak is None or bare is None else peak - bare)
    host = _number(row.get("host_growth_gb"))
    return [row["work"], row["by"], _number(peak), beyond, host, parts if "forward_s" in last else ""]


def _raw(row: dict[str, Any]) -> str:
    raw = row["raw"]
    how = "O_DIRECT" if raw["direct"] else "through the page cache"
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in _raw_rates(raw).items())
    unsettled = [
        f" It never settled {when} it ({min(probes):.2f} to {max(probes):.2f} GB/s in {len(probes)} probes): shares of "
        "that rate are uncertain."
        for when in ("before", "after")
        if not raw[when]["settled"] and (probes := raw[when]["probes_gb_s"])
    ]
    return (
        f"- The disk alone, before and after {row['work']} by {row['by']}, read + written: {rates} GB/s "
        f"({raw['block_mib']:g} MiB, {raw['threads']} threads, {how})." + "".join(unsettled)
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
