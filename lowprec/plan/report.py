"""``Plan``: the answer to ``lowprec plan``, as JSON and as a drawn table."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowprec.config import Recipe
from lowprec.machine import Footprint, Machine, footprint
from lowprec.plan.predict import GIB, PARTS, Prediction
from lowprec.plan.search import Advice, Nearest

BAR = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a recipe takes, and what would fit."""

    recipe: Recipe
    prediction: Prediction
    machine: Machine | None
    vram_gib: float | None
    """Of the card, or what the user allows."""
    largest: tuple[int, int] | None = None
    advice: list[Advice] = field(default_factory=list)
    nearest_recipe: Nearest | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        """None where no amount of memory is known."""
        return None if self.vram_gib is None else self.prediction.total <= self.vram_gib * GIB

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; GiB are 2**30 bytes."""
        p, time = self.prediction, self.prediction.time
        written = p.states.step_written
        tbw = getattr(self.recipe.state_store, "drive_tbw", None)
        print_ = self._footprint()
        return {
            "recipe": self.recipe.name,
            "model": self.recipe.model.model_name_or_path,
            "machine": None if self.machine is None else self.machine.name,
            "machine_measured": None if self.machine is None else self.machine.measured,
            "per_device_train_batch_size": p.rows,
            "max_length": p.length,
            "vram_gib": self.vram_gib,
            "fits": self.fits,
            "peak_gib": p.total / GIB,
            "peak_allocated_gib": p.peak.allocated / GIB,
            "peak_reserved_gib": p.reserved / GIB,
            "peak_phase": p.peak.phase,
            "parts_gib": {name: p.parts[name] / GIB for name in PARTS},
            "phases_gib": {name: size / GIB for name, size in p.peak.by_phase.items()},
            "peak_ram_gib": p.ram / GIB,
            "disk_gib": p.disk / GIB,
            "disk_gib_per_step": (p.states.step_read + written) / GIB,
            "disk_written_gib_per_step": written / GIB,
            "drive_life_steps": None if not written or tbw is None else tbw * 1e12 / written,
            "step_time_ms": None if time is None else time.total_ms,
            "step_time_parts_ms": None if time is None else asdict(time),
            "tokens_per_second": p.tokens_per_second,
            "energy_j_per_step": p.energy_j,
            "footprint_per_step": None if print_ is None else asdict(print_),
            "largest": None
            if self.largest is None
            else {"per_device_train_batch_size": self.largest[0], "max_length": self.largest[1]},
            "advice": [asdict(change) for change in self.advice],
            "nearest_recipe": None if self.nearest_recipe is None else self.nearest_recipe.name,
            "nearest_recipe_also": [] if self.nearest_recipe is None else list(self.nearest_recipe.also),
            "layers": p.schemes,
            "notes": self.notes,
        }

    def _footprint(self) -> Footprint | None:
        """Of a step; None where its time or the board's limit is not known."""
        joules, time = self.prediction.energy_j, self.prediction.time
        if joules is None or time is None:
            return None
        return footprint(joules, time.total_ms / 3.6e6, self.recipe.train.grid_g_co2e_per_kwh)

    def render(self, console: Console) -> None:
        """The table: a bar for each part, what fits, and what to change."""
        p = self.prediction
        limit = self.vram_gib
        console.print(self._title())
        table = Table(box=None, pad_edge=False, show_header=False)
        whole = max(p.total, int((limit or 0) * GIB))
        before = 0
        for name in PARTS:
            size = p.parts[name]
            if size < 0.001 * GIB:
                continue
            start, end = round(BAR * before / whole), round(BAR * (before + size) / whole)
            bar = Text(" " * start + "█" * max(end - start, 1), style=_COLOURS.get(name, "white"))
            table.add_row(name, f"{size / GIB:7.2f} GiB", bar)
            before += size
        total = Text("─" * round(BAR * p.total / whole) + "┤", style="bold")
        table.add_row("[bold]peak[/]", f"[bold]{p.total / GIB:7.2f} GiB[/]", total)
        if limit is not None:
            edge = Text(
                " " * min(round(BAR * limit * GIB / whole), BAR) + "┃", style="bold green" if self.fits else "bold red"
            )
            table.add_row("memory", f"{limit:7.2f} GiB", edge)
        console.print(table)
        for line in self._lines():
            console.print(line, highlight=False)

    def _title(self) -> str:
        p, recipe = self.prediction, self.recipe
        where = "an unnamed GPU" if self.machine is None else self.machine.name
        return (
            f"[bold]{recipe.name}[/] of {recipe.model.model_name_or_path} on {where}: {p.rows} x {p.length} tokens, "
            f"{recipe.train.gradient_accumulation_steps} micro-batches a step; the peak is in {p.peak.phase}"
        )

    def _lines(self) -> list[str]:
        p = self.prediction
        lines = [
            f"allocated {p.peak.allocated / GIB:.2f} GiB, reserved {p.reserved / GIB:.2f} GiB; "
            f"host memory {p.ram / GIB:.1f} GiB, disk {p.disk / GIB:.1f} GiB"
        ]
        if p.states.step_written:
            lines.append(
                f"disk traffic {(p.states.step_read + p.states.step_written) / GIB:.1f} GiB a step" + self._wear()
            )
        if p.time is not None and p.tokens_per_second is not None:
            source = "measured rates" if self.machine and self.machine.measured else "datasheet rates"
            lines.append(f"{p.time.total_ms:,.0f} ms a step, {p.tokens_per_second:,.0f} tokens/s (predicted, {source})")
        print_ = self._footprint()
        if print_ is not None and print_.energy_kwh is not None and print_.co2e_g is not None:
            lines.append(
                f"{p.energy_j:,.0f} J a step at the board's limit: 1,000 steps take {1e3 * print_.energy_kwh:.3g} kWh, "
                f"{print_.co2e_g:.3g} kg CO2e (train.grid_g_co2e_per_kwh={print_.grid_g_co2e_per_kwh:g})"
            )
        if self.fits:
            lines.append(f"[bold green]It fits.[/]{self._room()}")
        elif self.fits is False:
            over = p.total / GIB - (self.vram_gib or 0)
            lines.append(f"[bold red]It does not fit[/]: {over:.2f} GiB too much.{self._room()}")
        if self.advice:
            lines.append("Change first (each by itself):")
            for change in self.advice:
                also = f" {change.also}" if change.also else ""
                mark = "  [green]fits[/]" if change.fits else ""
                lines.append(f"  {change.key}={change.value}{also}  saves {change.saves_gib:.2f} GiB{mark}")
        if self.nearest_recipe:
            keys = " ".join(self.nearest_recipe.also)
            lines.append(f"Nearest shipped recipe that fits: [bold]{self.nearest_recipe.name}[/] {keys}".rstrip())
        elif self.fits is False:
            lines.append("No shipped recipe fits, not even one row at a time.")
        return lines + [f"[yellow]Note:[/] {note}" for note in self.notes]

    def _room(self) -> str:
        if self.largest is None:
            return "" if self.fits else " Not even one row of 64 tokens does."
        rows, length = self.largest
        return f" The largest micro-batch that fits: {rows} x {length} tokens."

    def _wear(self) -> str:
        tbw, written = getattr(self.recipe.state_store, "drive_tbw", None), self.prediction.states.step_written
        if tbw is None:
            return " (state_store.drive_tbw=... tells what that wears off the drive)"
        steps = tbw * 1e12 / written
        return f", {written / GIB:.2f} GiB of it written: the drive's {tbw:g} TBW last {steps:,.0f} such steps"


_COLOURS = {
    "weights": "blue",
    "adapters": "cyan",
    "gradients": "magenta",
    "optimizer": "yellow",
    "activations": "green",
    "logits": "red",
    "workspace": "bright_black",
    "slack": "bright_black",
    "context": "bright_black",
}
