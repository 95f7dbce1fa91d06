"""What became of every linear layer: the rows, the shares, the printed table."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lowprec.fused.report import FusedRow
from lowprec.layers.base import WeightScheme

BF16 = "bf16"


@dataclass(kw_only=True, slots=True)
class LinearRow:
    """One linear layer, or one fused expert weight."""

    name: str
    """Module path in the model; for a fused expert weight the path of the parameter."""
    shape: list[int]
    """``[out, in]``; ``[experts, out, in]`` for a fused expert weight."""
    scheme: str
    """The scheme it was converted to, ``bf16`` where it was left alone."""
    kernel: str = ""
    """The product that runs."""
    rotation_block: int | None = None
    """Order of the Hadamard blocks, None where nothing is rotated."""
    reason: str = ""
    """Why it was left alone, or why ``auto`` chose this scheme."""
    parameters: int = 0
    flops_per_token: float = 0.0
    """Of the forward product, 2 x out x in; of fused experts those that a token visits."""

    @property
    def converted(self) -> bool:
        return self.scheme != BF16


@dataclass(slots=True)
class WrapReport:
    """The result of ``wrap``: every linear layer with its scheme or the reason against it. Prints as a table."""

    rows: list[LinearRow]
    parameters: int
    """Of the whole model, tied ones once."""
    notes: list[str] = field(default_factory=list)
    fused: list[FusedRow] = field(default_factory=list)
    """Norms, MLPs, rotary embeddings and the loss: which kernel computes them, or why none does."""
    choices: dict[str, WeightScheme | None] = field(default_factory=dict)
    """Layer -> the scheme that one which chooses took for it, None for 16 bits. ``wrap`` takes them again."""

    def counts(self) -> dict[str, int]:
        """Scheme -> number of layers."""
        return dict(Counter(row.scheme for row in self.rows))

    @property
    def converted(self) -> list[LinearRow]:
        return [row for row in self.rows if row.converted]

    @property
    def parameter_share(self) -> float:
        """Share of the model's parameters that are multiplied in low precision."""
        return sum(row.parameters for row in self.converted) / max(self.parameters, 1)

    @property
    def flop_share(self) -> float:
        """Share of the forward products with weights (attention's own products not counted) in low precision."""
        return sum(row.flops_per_token for row in self.converted) / max(sum(r.flops_per_token for r in self.rows), 1.0)

    def summary(self) -> str:
        """One line: how many layers were converted, and what share of the model that is."""
        return (
            f"{len(self.converted)} of {len(self.rows)} linear layers converted: {self.parameter_share:.1%} of all "
            f"parameters, {self.flop_share:.1%} of the FLOPs of products with weights."
        )

    def fused_lines(self) -> list[str]:
        """A line for each kernel with what it computes, then one for each reason why the model's own code stays."""
        lines: dict[str, list[str]] = {}
        for row in sorted(self.fused, key=lambda row: not row.fused):
            lines.setdefault(f"By {row.what}", []).append(f"{row.modules} {row.module} ({row.part})")
        return [f"{what}: {', '.join(parts)}." for what, parts in lines.items()]

    def to_dict(self) -> dict:
        """Everything, as plain JSON types."""
        return {
            "counts": self.counts(),
            "parameter_share": self.parameter_share,
            "flop_share": self.flop_share,
            "notes": self.notes,
            "fused": [asdict(row) for row in self.fused],
            "linears": [asdict(row) for row in self.rows],
        }

    def table(self) -> Table:
        """One row for each distinct shape, scheme, kernel and reason, with the names folded."""
        folded: dict[tuple, list[str]] = {}
        for row in self.rows:
            key = (_fold(row.name), tuple(row.shape), row.scheme, row.kernel, row.rotation_block, row.reason)
            folded.setdefault(key, []).append(row.name)
        show_rotation = any(row.rotation_block for row in self.rows)
        table = Table(title="Linear layers", title_justify="left", caption=self._caption(), caption_justify="left")
        for column in ("layers", "name", "shape", "scheme", "kernel"):
            table.add_column(column, justify="right" if column == "layers" else "left", overflow="fold")
        if show_rotation:
            table.add_column("rotation", justify="right")
        table.add_column("reason", overflow="fold")
        for (name, shape, scheme, kernel, block, reason), names in folded.items():
            cells = [str(len(names)), names[0] if len(names) == 1 else name, "x".join(map(str, shape)), scheme, kernel]
            table.add_row(*cells, *([str(block or "")] if show_rotation else []), reason)
        return table

    def _caption(self) -> Text:
        """As plain text: a reason may name a package with an extra, whose brackets are no markup."""
        return Text("\n".join([self.summary(), *self.notes, *self.fused_lines()]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def __str__(self) -> str:
        console = Console(width=140, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def _fold(name: str) -> str:
    """``model.layers.11.mlp.up_proj`` -> ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
