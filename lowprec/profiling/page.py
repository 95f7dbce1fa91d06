"""``profile.html``: one page that holds all it shows, so that it opens from a mail."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lowprec.profiling.charts import areas, bar, columns, legend
from lowprec.profiling.phases import PHASES
from lowprec.profiling.table import gib, grams, ms, percent, rates, ratio, rows

Figures = dict[str, Any]

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c1d1f;--soft:#62656b;--line:#e3e3e0;--on:#fff;
--c1:#3b6fb0;--c2:#3f9c95;--c3:#c8453f;--c4:#d9822b;--c5:#4f9145;--c6:#9a5f93;--c7:#8a8d93;--c8:#b9bbc0;--c9:#6d6259}
@media (prefers-color-scheme:dark){:root{--bg:#16181b;--card:#1e2125;--ink:#e9eaec;--soft:#a2a6ad;--line:#33373d;
--on:#101214;--c1:#7aa8e0;--c2:#76c5be;--c3:#ec827b;--c4:#f0ac62;--c5:#86c47b;--c6:#c99ac3;--c7:#9a9da4;--c8:#6f737a;
--c9:#b3a698}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"DejaVu Sans",sans-serif}main{max-width:940px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:17px;margin:0 0 10px}p{margin:6px 0}.soft{color:var(--soft)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:22px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}
svg{display:block;width:100%;height:auto;overflow:visible}svg text{font-size:12px;fill:var(--soft)}
svg text.on{fill:var(--on)}svg text.end{text-anchor:end}svg text.mid{text-anchor:middle}
svg text.phase{dominant-baseline:hanging}svg .grid{stroke:var(--line)}svg .edge{stroke:var(--soft);stroke-dasharray:2 3}
svg .mark{stroke:var(--c3);stroke-width:2}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:10px 0 0;font-size:13px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);text-align:left}th,td{padding:4px 12px 4px 0;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right}td.n{white-space:nowrap}
td.name{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:12.5px;
overflow-wrap:anywhere}tr:last-child td{border-bottom:0}.warn{border-left:4px solid var(--c4)}
.bad{border-left:4px solid var(--c3)}.two{display:grid;grid-template-columns:1fr 1fr;gap:16px}
p,h2,.legend{overflow-wrap:anywhere}summary{cursor:pointer}
pre{font:12.5px/1.45 ui-monospace,"DejaVu Sans Mono",monospace;overflow-x:auto;margin:8px 0 0}
@media (max-width:700px){.two{grid-template-columns:1fr}section{padding:14px}th,td{padding:4px 7px 4px 0}
table{font-size:12px}td.name{font-size:11px}.tile b{font-size:19px}svg text.axis{font-size:18px}
svg text.on{display:none}.legend{margin-top:14px}}
@media (max-width:480px){svg text.axis{font-size:26px}}
"""


def page(figures: Figures) -> str:
    """The page of one profile."""
    title = f"{figures['name']}: profile"
    parts = [
        f"<h1>{escape(str(figures['name']))}</h1>",
        f'<p class="soft">{escape(_where(figures))}</p>',
        _status(figures),
        _tiles(figures),
        _notes(figures),
        _time(figures),
        _memory(figures),
        _kernels(figures),
        _mfu(figures),
        _power(figures),
        _recipe(figures),
        _environment(figures),
    ]
    return _document(title, parts)


def comparison(first: Figures, second: Figures) -> str:
    """The page of two profiles side by side."""
    told = [
        (label.replace("  ", "\u00a0\u00a0"), *texts, ratio(one, other))
        for label, texts, (one, other) in rows(first, second)
    ]
    columns = [("", ""), (first["name"], "n"), (second["name"], "n"), ("second / first", "n")]
    step = max(sum(_phase_parts(f).values()) for f in (first, second))
    memory = max(sum(_kinds(f).values()) for f in (first, second))
    parts = [
        "<h1>Profiles side by side</h1>",
        *(f'<p class="soft"><b>{escape(str(f["name"]))}</b>: {escape(_where(f))}</p>' for f in (first, second)),
        *(_status(f) for f in (first, second)),
        _section("Figures", _table(columns, told)),
        _section("A step, on one scale", "".join(_named(f, _phase_bar(f, step)) for f in (first, second))),
        _section("Memory at the peak, on one scale", "".join(_named(f, _kind_bar(f, memory)) for f in (first, second))),
        _section("Memory through one step", "".join(_named(f, _timeline(f)) for f in (first, second))),
    ]
    return _document("Profiles side by side", parts)


def _document(title: str, parts: Sequence[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{body}</section>' if body else ""


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> str:
    """``columns``: heading and CSS class (``n`` for numbers, ``name`` for code)."""
    head = "".join(f'<th class="{kind}">{escape(heading)}</th>' for heading, kind in columns)
    body = ""
    for row in rows:
        cells = (f'<td class="{kind}">{escape(str(value))}</td>' for value, (_, kind) in zip(row, columns, strict=True))
        body += f"<tr>{''.join(cells)}</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _named(figures: Figures, body: str) -> str:
    return f'<p class="soft">{escape(str(figures["name"]))}</p>{body}' if body else ""


def _where(figures: Figures) -> str:
    gpus, cores = figures["hardware"].get("gpus") or [], figures["hardware"]["cores"]
    on_gpu = figures["device"].startswith("cuda") and gpus
    place = gpus[0]["name"] if on_gpu else f"{figures['hardware']['cpu']}, {cores} cores"
    told = [f"{figures['steps']} measured steps after {figures['warmup_steps']} of warm-up", place]
    told += [figures["date"]] if "date" in figures else []
    if figures.get("vram_limit_gib"):
        told.append(f"limited to {figures['vram_limit_gib']:g} GiB")
    return ", ".join(told)


def _status(figures: Figures) -> str:
    if figures["status"] == "ok":
        return ""
    advice = figures.get("out_of_memory") or {}
    lines = [f"<p>{escape(line)}</p>" for line in advice.get("told", [])]
    return _section(f"{figures['name']}: {figures['status'].replace('_', ' ')}", "".join(lines) or "<p></p>", "bad")


def _tiles(figures: Figures) -> str:
    memory, mfu, power = (figures.get(key) or {} for key in ("memory", "mfu", "power"))
    peak = figures.get("peak_vram_gib") or memory.get("peak_gib")
    named = "peak VRAM" if figures.get("peak_vram_gib") else "peak of tensors"
    tiles = [
        ("trained tokens/s", figures.get("tokens_per_second"), rates),
        ("all tokens/s", figures.get("all_tokens_per_second"), rates),
        ("step time, median", figures.get("step_time_ms_p50"), ms),
        (named, peak, gib),
        ("MFU", mfu.get("mfu"), percent),
        ("J a trained token", power.get("energy_j_per_token"), lambda value: f"{value:.3g}"),
        ("casts and rotations", (figures.get("kernels") or {}).get("casts_and_rotations"), percent),
    ]
    known = [(name, write(value)) for name, value, write in tiles if value is not None]
    shown = [f'<div class="tile"><b>{escape(told)}</b><span>{escape(name)}</span></div>' for name, told in known]
    return f'<div class="tiles">{"".join(shown)}</div>' if shown else ""


def _notes(figures: Figures) -> str:
    return _section("Notes", "".join(f"<p>{escape(note)}</p>" for note in figures["notes"]), "warn")


def _phase_parts(figures: Figures) -> dict[str, float]:
    phases = figures.get("phases_ms") or {}
    return {name: phases[name] for name in PHASES if phases.get(name)}


def _phase_bar(figures: Figures, whole: float) -> str:
    parts = _phase_parts(figures)
    told = {name: f"{ms(value)}, {value / sum(parts.values()):.0%}" for name, value in parts.items()}
    return bar(parts, whole, told, "time by phase") + legend(told) if parts else ""


def _time(figures: Figures) -> str:
    parts = _phase_parts(figures)
    if not parts:
        return ""
    phases = figures["phases_ms"]
    disk, host = phases.get("disk_wait", 0), phases.get("host_sync", 0)
    within = f'<p class="soft">Of it the disk kept training waiting for {ms(disk)}.</p>' if disk else ""
    if figures["device"].startswith("cuda"):
        within += (
            f'<p class="soft">The host waited for the device for {ms(host)}, which costs nothing while the device has '
            "work.</p>"
        )
    spread = (
        f"<p>Median {ms(figures['step_time_ms_p50'])}, 90th percentile {ms(figures['step_time_ms_p90'])}</p>"
        f"{columns(figures['step_times_ms'], 'ms', 'time of each measured step')}"
    )
    return _section("Where a step's time goes", _phase_bar(figures, sum(parts.values())) + within) + _section(
        "Each measured step", spread
    )


def _kinds(figures: Figures) -> dict[str, float]:
    memory = figures.get("memory") or {}
    return {kind: value for kind, value in (memory.get("parts_gib") or {}).items() if value > 5e-5}  # GiB


def _kind_bar(figures: Figures, whole: float) -> str:
    parts = _kinds(figures)
    told = {kind: gib(value) for kind, value in parts.items()}
    return bar(parts, whole, told, "memory at the peak by kind") + legend(told) if parts else ""


def _timeline(figures: Figures) -> str:
    timeline = (figures.get("memory") or {}).get("timeline")
    if not timeline:
        return ""
    most = {kind: f"at most {gib(max(values))}" for kind, values in timeline["gib"].items() if any(values)}
    title = "GiB by kind through one step, operator by operator"
    return areas(timeline["gib"], timeline["phase"], "GiB", title) + legend(most)


def _memory(figures: Figures) -> str:
    memory = figures.get("memory")
    if not memory:
        return ""
    at = memory["at"]
    when = "Memory ran out" if memory["ran_out"] else "The peak"
    module = f" in {at['module']}" if at["module"] else ""
    where = f"{at['phase'] or 'before the step'}{module} ({at['operator']})"
    told = f"<p>{when}: {gib(memory['peak_gib'])}, {escape(where)}</p>"
    modules = _table(
        [("module", "name"), ("kind", ""), ("tensors", "n"), ("size", "n")],
        ((row["module"] or "(none)", row["kind"], row["tensors"], gib(row["gib"])) for row in memory["modules"]),
    )
    by_phase = {phase: gib(value) for phase, value in (figures.get("peak_by_phase_gib") or {}).items()}
    phases = f"<p>Peak by phase</p>{legend(by_phase)}" if by_phase else ""
    return (
        _section("Memory at the peak", told + _kind_bar(figures, sum(_kinds(figures).values())) + phases)
        + _section("Memory through one step, GiB", _timeline(figures))
        + _section("What was alive at the peak", modules)
    )


def _kernels(figures: Figures) -> str:
    kernels = figures.get("kernels")
    if not kernels:
        return ""
    shares = {name: percent(value) for name, value in kernels["shares"].items()}
    strip = bar(kernels["shares"], 1.0, shares, "time by class of kernel") + legend(shares)
    named = "kernel" if kernels["measured_on"] == "device" else "operator"
    table = _table(
        [(named, "name"), ("class", ""), ("calls", "n"), ("ms", "n"), ("share", "n")],
        (
            (row["name"], row["class"], row["calls"], f"{row['ms']:,.2f}", percent(row["share"]))
            for row in kernels["top"]
        ),
    )
    where = "kernels on the device" if named == "kernel" else "operators on the processor"
    total = f'<p class="soft">{where.capitalize()}, one step: {kernels["total_ms"]:,.1f} ms.</p>'
    return _section("Kernels", strip + total + table)


def _mfu(figures: Figures) -> str:
    mfu = figures.get("mfu")
    if not mfu:
        return ""
    shares = mfu.get("mfu_by_kind") or {}
    table = _table(
        [("products in", ""), ("TFLOP a step", "n"), ("peak TFLOP/s", "n"), ("share of the time at the peak", "n")],
        (
            (kind, f"{flops:,.4g}", _peak(mfu, kind), percent(shares[kind]) if kind in shares else "not known")
            for kind, flops in mfu["tflop_per_step"].items()
        ),
    )
    told = f"<p>{mfu['tflop_per_second']:,.3g} TFLOP/s of what the model needs"
    if mfu["mfu"] is not None:
        told += f": MFU {percent(mfu['mfu'])}, with what checkpointing computes again {percent(mfu['hfu'])}"
    return _section("Arithmetic", f'{told}.</p><p class="soft">Peak: {escape(mfu["peak_source"])}.</p>{table}')


def _peak(mfu: Figures, kind: str) -> str:
    return f"{mfu['peak_tflops'][kind]:,.1f}" if kind in mfu["peak_tflops"] else "not known"


def _power(figures: Figures) -> str:
    power = figures.get("power") or {}
    told = f'<p class="soft">{escape(str(power.get("note", "")))}</p>'
    if power.get("energy_j") is not None:
        spent = f"{power['energy_j']:,.0f} J in the measured steps, {power['power_w']:,.0f} W."
        emitted = power.get("co2e_g_per_million_tokens")
        if emitted is not None:
            grid = f"{power['grid_g_co2e_per_kwh']:g} g a kWh (train.grid_g_co2e_per_kwh)"
            spent += f" {grams(emitted)} CO2e a million trained tokens, at {grid}."
        told = f"<p>{spent}</p>{told}"
    return _section("Energy", told)


def _recipe(figures: Figures) -> str:
    if not figures.get("recipe"):
        return ""
    layers = ", ".join(f"{count} {scheme}" for scheme, count in (figures.get("layers") or {}).items())
    told = f'<p class="soft">Linear layers: {escape(layers)}.</p>' if layers else ""
    folded = f"<details><summary>Every key with its value</summary><pre>{escape(figures['recipe'])}</pre></details>"
    return _section("The recipe, as it was measured", told + folded)


def _environment(figures: Figures) -> str:
    told = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    beside = f"Beside this page: {', '.join(figures.get('files', []))}. "
    beside += "A trace opens in ui.perfetto.dev or chrome://tracing."
    return _section("Made with", f'<p class="soft">{escape(told)}</p><p class="soft">{escape(beside)}</p>')
