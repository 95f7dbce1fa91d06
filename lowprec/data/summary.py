"""What the report and the screen say of the data."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from lowprec.data.build import Counts
from lowprec.data.samples import Rows, Samples


@dataclass(kw_only=True, slots=True)
class DataSummary:
    """Counts of records, samples and tokens. Lengths are those of the training samples, before packing."""

    path: str
    format: str
    read: Counts
    train_samples: int
    eval_samples: int
    eval_also_in_train: int
    """Held-out samples of ``data.eval_path`` whose content is also trained on."""
    train_rows: int
    tokens: int
    trained_tokens: int
    packing_padding_share: float | None
    """Share of padding in rows of ``data.max_length``; None without packing, where it depends on the batch."""
    max_length: int
    length_histogram: dict[str, int] = field(default_factory=dict)
    """Number of samples by tokens: ``"129-256": 17``."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(title=f"Data: {self.path} ({self.format})", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        table.add_row("records read", f"{self.read.records:,}")
        table.add_row("samples trained / held out", f"{self.train_samples:,} / {self.eval_samples:,}")
        table.add_row("tokens, of these trained", f"{self.tokens:,}, {self.trained_tokens:,}")
        for reason, number in self.read.dropped.items():
            table.add_row(f"dropped: {reason}", f"{number:,}")
        optional = {
            "truncated": self.read.truncated,
            "texts split": self.read.split,
            "conversations trained answer by answer": self.read.conversations_by_answer,
            "held-out samples that are also trained on": self.eval_also_in_train,
        }
        for name, number in optional.items():
            if number:
                table.add_row(name, f"{number:,}")
        if self.packing_padding_share is not None:
            table.add_row("packed rows, their padding", f"{self.train_rows:,}, {self.packing_padding_share:.1%}")
        table.add_row("lengths", "  ".join(f"{span}: {number:,}" for span, number in self.length_histogram.items()))
        return table


def length_histogram(lengths: np.ndarray, max_length: int) -> dict[str, int]:
    """Counts between powers of two up to ``max_length``, without the empty bins."""
    edges = [0, *(2**power for power in range(4, 32) if 2**power < max_length), max_length]
    counts, _ = np.histogram(lengths, bins=np.array(edges) + 1)
    return {
        f"{low + 1}-{high}": int(count) for low, high, count in zip(edges, edges[1:], counts, strict=False) if count
    }


def summarise(
    *,
    path: str,
    read: Counts,
    train: Samples,
    rows: Rows,
    eval_samples: int,
    eval_also_in_train: int,
    max_length: int,
) -> DataSummary:
    """The summary of map-style data."""
    tokens = int(train.num_tokens.sum())
    return DataSummary(
        path=path,
        format=" + ".join(sorted(read.layouts)),
        read=read,
        train_samples=len(train),
        eval_samples=eval_samples,
        eval_also_in_train=eval_also_in_train,
        train_rows=len(rows),
        tokens=tokens,
        trained_tokens=int(train.num_trained.sum()),
        packing_padding_share=1 - tokens / (len(rows) * max_length) if rows.packed else None,
        max_length=max_length,
        length_histogram=length_histogram(train.num_tokens, max_length),
    )
