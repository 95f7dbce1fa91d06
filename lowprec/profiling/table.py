"""One profile as a table for the terminal; several beside each other."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table

Figures = dict[str, Any]
Row = tuple[str, Callable[[Figures], float | None], Callable[[float], str]]


def _at(*path: str) -> Callable[[Figures], Any]:
    def find(figures: Figures) -> Any:
        value: Any = figures
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return find


def rates(value: float) -> str:
    return f"{value:,.0f}"


def ms(value: float) -> str:
    return f"{value:,.1f} ms" if value < 1000 else f"{value / 1000:,.2f} s"


def gib(value: float) -> str:
    return f"{value * 1024:,.1f} MiB" if value < 0.1 else f"{value:.2f} GiB"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 else f"{100 * value:.3f} %"


def grams(value: float) -> str:
    return f"{value:,.3g} g" if value < 1000 else f"{value / 1000:,.3g} kg"


def _joules(value: float) -> str:
    return f"{value:.3g} J"


ROWS: tuple[Row, ...] = (
    ("trained tokens/s", _at("tokens_per_second"), rates),
    ("all tokens/s", _at("all_tokens_per_second"), rates),
    ("tokens/s, padding too", _at("padded_tokens_per_second"), rates),
    ("step time, median", _at("step_time_ms_p50"), ms),
    ("step time, 90th percentile", _at("step_time_ms_p90"), ms),
    *((f"  {name}", _at("phases_ms", name), ms) for name in ("data", "forward", "backward", "optimizer", "other")),
    ("  waiting for the disk", _at("phases_ms", "disk_wait"), ms),
    ("  host waiting for the device", _at("phases_ms", "host_sync"), ms),
    ("peak VRAM, allocated", _at("peak_vram_gib"), gib),
    ("peak VRAM, reserved", _at("peak_reserved_gib"), gib),
    ("peak of tensors", _at("memory", "peak_gib"), gib),
    *(
        (f"  {kind}", _at("memory", "parts_gib", kind), gib)
        for kind in ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace", "slack",
                     "context")
    ),
    ("peak RAM", _at("peak_ram_gib"), gib),
    ("MFU", _at("mfu", "mfu"), percent),
    ("HFU, recomputation counted", _at("mfu", "hfu"), percent),
    ("TFLOP/s", _at("mfu", "tflop_per_second"), lambda value: f"{value:.3g}"),
    ("power", _at("power", "power_w"), lambda value: f"{value:.0f} W"),
    ("energy a trained token", _at("power", "energy_j_per_token"), _joules),
    ("CO2e a million trained tokens", _at("power", "co2e_g_per_million_tokens"), grams),
    ("casts and rotations", _at("kernels", "casts_and_rotations"), percent),
    ("cost of the probes", _at("probe_cost_share"), percent),
)  # fmt: skip
"""What is shown: label, where it is, how it is written. Rows without a figure are left out."""


def table(figures: Figures) -> Table:
    """One profile."""
    title = f"{figures['name']}: {_status(figures)}{figures['steps']} steps after {figures['warmup_steps']} of warm-up"
    shown = Table(title=title, title_justify="left", show_header=False, min_width=len(title))
    shown.add_column()
    shown.add_column(justify="right")
    for label, (told,), _ in rows(figures):
        shown.add_row(label, told)
    return shown


def side_by_side(first: Figures, second: Figures) -> Table:
    """Two profiles, and what the second is of the first."""
    shown = Table(
        "", first["name"], second["name"], "second / first", title="Profiles side by side", title_justify="left"
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    for label, told, (one, other) in rows(first, second):
        shown.add_row(label, *told, ratio(one, other))
    return shown


def rows(*profiles: Figures) -> Iterator[tuple[str, list[str], list[float | None]]]:
    """Label, what is shown of each profile, and the figures behind it. A part that shows as nothing has no row."""
    for label, find, write in ROWS:
        values = [find(figures) for figures in profiles]
        told = ["" if value is None else write(value) for value in values]
        if any(told) and not (label.startswith("  ") and all(text.startswith("0.0 ") for text in told if text)):
            yield label, told, values


def _status(figures: Figures) -> str:
    return "" if figures["status"] == "ok" else f"{figures['status'].replace('_', ' ')}, "


def ratio(first: float | None, second: float | None) -> str:
    """``1.25 x`` where both are known and the first is not 0."""
    return f"{second / first:.2f} x" if first and second is not None else ""
