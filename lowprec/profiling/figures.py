"""From what a session has seen to the figures of ``profile.json``. Every field is described in docs/profile.md."""

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from lowprec.machine import footprint
from lowprec.machine.context import own_context
from lowprec.profiling.alive import Timeline
from lowprec.profiling.flops import utilisation
from lowprec.profiling.memory import GIB
from lowprec.profiling.phases import PHASES
from lowprec.report import hardware, peak_memory, versions

if TYPE_CHECKING:
    from lowprec.profiling.session import Session

SCHEMA = 1
OK, OUT_OF_MEMORY, INCOMPLETE = "ok", "out_of_memory", "incomplete"


def figures(session: "Session") -> dict[str, Any]:
    """All that is known; what was not measured is None or left out."""
    rows = session.rows
    status = OUT_OF_MEMORY if session.ran_out_of_memory else OK if session.done else INCOMPLETE
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "name": session.name,
        "status": status,
        "warmup_steps": session.warmup_steps,
        "steps": len(rows),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": str(session.device),
        **_speed(rows),
        **_memory(session),
        "mfu": None,
        "power": _power(session, rows),
        "kernels": session.kernels.to_dict() if session.kernels is not None else None,
        "probe_cost_share": None,
        "notes": _notes(session, status),
        "versions": versions(),
        "hardware": hardware(),
    }
    if rows:
        found["probe_cost_share"] = session.probe_host_s / (sum(row["step_time_ms"] for row in rows) / 1000)
        if session.flops is not None:
            found["mfu"] = utilisation(session.flops.counts, _time_of_followed(session, found), session.device)
    return found


def _notes(session: "Session", status: str) -> list[str]:
    notes = []
    if status == INCOMPLETE:
        notes.append(
            f"The loop ended after {session.num_steps} of {session.num_steps_wanted} steps, which a whole profile "
            "takes: what the others would have shown is missing."
        )
    if session.kernels is not None and session.kernels.on_device and not session.kernels.total_ms:
        notes.append(
            "No kernel was seen: the driver lets none be traced here (containers, WSL, or performance counters for "
            "administrators alone)."
        )
    return notes


def _time_of_followed(session: "Session", found: dict[str, Any]) -> float:
    """Seconds that the step whose products were counted takes at the measured speed: batches differ in length."""
    rate, tokens = found.get("padded_tokens_per_second"), session.followed_tokens
    return tokens / rate if rate and tokens else found["step_time_ms_p50"] / 1000


def _speed(rows: list[dict[str, float]]) -> dict[str, Any]:
    if not rows:
        return {}
    times = sorted(row["step_time_ms"] for row in rows)
    seconds = sum(times) / 1000
    counted = {kind: sum(row[kind] for row in rows) for kind in ("trained_tokens", "tokens", "padding")}
    names = [f"{name}_ms" for name in (*PHASES, "disk_wait", "host_sync") if any(f"{name}_ms" in row for row in rows)]
    phases = {name.removesuffix("_ms"): statistics.median(row.get(name, 0.0) for row in rows) for name in names}
    return {
        # Over the whole of the measured steps: batches differ in length, so a median of rates would favour some.
        "tokens_per_second": counted["trained_tokens"] / seconds or None,
        "all_tokens_per_second": counted["tokens"] / seconds or None,
        "padded_tokens_per_second": (counted["tokens"] + counted["padding"]) / seconds or None,
        "step_time_ms_p50": statistics.median(times),
        "step_time_ms_p90": times[min(int(0.9 * len(times)), len(times) - 1)],
        "step_times_ms": [round(row["step_time_ms"], 3) for row in rows],
        "phases_ms": phases,
    }


def _memory(session: "Session") -> dict[str, Any]:
    found: dict[str, Any] = {"peak_ram_gib": peak_memory()["peak_ram_gib"], "peak_vram_gib": None, "memory": None}
    cuda = session.device.type == "cuda"
    if cuda:
        peaks = sorted({name for row in session.rows for name in row if name.startswith("peak_")})
        found |= {
            "peak_vram_gib": session.peak.allocated / GIB,
            "peak_reserved_gib": session.peak.reserved / GIB,
            "peak_by_phase_gib": {
                name.removeprefix("peak_").removesuffix("_gib"): max(row.get(name, 0.0) for row in session.rows)
                for name in peaks
            },
        }
    if session.timeline is not None:
        found["memory"] = memory_figures(session.timeline)
        if cuda:
            slack = max(session.peak.reserved - session.peak.allocated, 0)
            context = own_context(session.device)
            found["memory"]["parts_gib"] |= {"slack": slack / GIB, "context": context.nbytes / GIB}
            found["memory"]["context_from"] = context.source
    return found


def memory_figures(timeline: Timeline) -> dict[str, Any]:
    """The peak by kind and module, and the course of one step, in GiB."""
    moment = timeline.alive.moments[timeline.at]
    points = timeline.points()
    moments = [timeline.alive.moments[point] for point in points]
    return {
        "peak_gib": int(timeline.peak[timeline.at]) / GIB,
        "at": {"phase": moment.phase, "module": moment.module, "operator": moment.operator},
        "ran_out": timeline.alive.failed_at is not None,
        "parts_gib": {kind: size / GIB for kind, size in timeline.parts().items()},
        "modules": [
            {"module": module, "kind": kind, "gib": size / GIB, "tensors": count}
            for module, kind, size, count in timeline.modules()
        ],
        "timeline": {
            "operators": len(timeline.peak),
            "operator": points,
            "phase": [moment.phase for moment in moments],
            "gib": {kind: [round(int(s[p]) / GIB, 6) for p in points] for kind, s in timeline.by_kind.items()},
        },
    }


def _power(session: "Session", rows: list[dict[str, float]]) -> dict[str, Any]:
    meter = session.power.meter
    found: dict[str, Any] = {"source": meter.source, "note": meter.note, "energy_j": None}
    joules = [row["energy_j"] for row in rows if "energy_j" in row]
    if not joules:
        return found
    seconds = sum(row["step_time_ms"] for row in rows) / 1000
    tokens = sum(row["trained_tokens"] for row in rows)
    everything = sum(row["tokens"] for row in rows)
    hours = seconds / 3600 if session.device.type == "cuda" else 0.0
    cost = footprint(sum(joules), hours, session.grid_g_co2e_per_kwh)
    return found | {
        "energy_j": sum(joules),
        "power_w": sum(joules) / seconds,
        "energy_j_per_token": sum(joules) / tokens if tokens else None,
        "energy_j_per_any_token": sum(joules) / everything if everything else None,
        "grid_g_co2e_per_kwh": cost.grid_g_co2e_per_kwh,
        "co2e_g_per_million_tokens": cost.co2e_g / tokens * 1e6 if tokens and cost.co2e_g is not None else None,
    }


def plain(device: torch.device) -> str:
    """What a person calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
