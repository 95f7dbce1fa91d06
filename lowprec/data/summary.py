"""What the report and the screen say of the data."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from lowprec.data.build import Counts


@dataclass(kw_only=True, slots=True)
class DataSummary:
    """Counts of records, samples and tokens; None where a stream does not tell. Lengths are those before packing."""

    path: str
    format: str
    read: Counts
    """What became of the records of ``data.path``; of a stream, of those read so far."""
    max_length: int
    eval_samples: int
    eval_also_in_train: int | None = None
    """Held-out samples of ``data.eval_path`` whose content is also trained on."""
    train_samples: int | None = None
    train_rows: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    padding_share: float | None = None
    """Share of padding: of packed rows filled up to ``data.max_length``. Without packing it depends on the batches, see
    :attr:`lowprec.data.loader.StepLoader.padding_share`."""
    length_histogram: dict[str, int] = field(default_factory=dict)
    """Number of samples by tokens: ``"129-256": 17``."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(title=f"Data: {self.path} ({self.format})", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        numbers = {
            "records read": self.read.records,
            "samples to train on": self.train_samples,
            "samples held out": self.eval_samples,
            "tokens": self.tokens,
            "tokens trained": self.trained_tokens,
            "packed rows": self.train_rows if self.train_rows != self.train_samples else None,
            **{f"dropped: {reason}": number for reason, number in self.read.dropped.items()},
            f"truncated to {self.max_length}": self.read.truncated or None,
            "texts split": self.read.split or None,
            "conversations trained answer by answer": self.read.conversations_by_answer or None,
            "held-out samples that are also trained on": self.eval_also_in_train or None,
        }
        for name, number in numbers.items():
            if number is not None:
                table.add_row(name, f"{number:,}")
        if self.padding_share is not None:
            table.add_row("padding", f"{self.padding_share:.1%}")
        if self.length_histogram:
            table.add_row("samples by length", "  ".join(f"{s}: {n:,}" for s, n in self.length_histogram.items()))
        return table


def length_histogram(lengths: np.ndarray, max_length: int) -> dict[str, int]:
    """Counts between powers of two up to ``max_length``, without the empty bins."""
    edges = [0, *(2**power for power in range(4, 32) if 2**power < max_length), max_length]
    counts, _ = np.histogram(lengths, bins=np.array(edges) + 1)
    return {
        f"{low + 1}-{high}": int(count) for low, high, count in zip(edges, edges[1:], counts, strict=False) if count
    }
