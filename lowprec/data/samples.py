"""Tokenised samples on disk (memory-mapped Arrow), and views of them: a part, and rows of several samples."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from lowprec.data.build import StoredSample
from lowprec.data.chat import IGNORE
from lowprec.data.rows import Item, PackedAttention

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("num_trained", pa.int32()),
        ("prompt_length", pa.int32()),
        ("key", pa.string()),
    ]
)
_SAMPLES_A_BATCH = 1000


def write_samples(path: Path, samples: Iterable[StoredSample]) -> None:
    """Write an Arrow stream file, a thousand samples in memory at a time."""
    pending: list[StoredSample] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:

        def flush() -> None:
            columns = {name: [getattr(sample, name) for sample in pending] for name in SCHEMA.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
            pending.clear()

        for sample in samples:
            pending.append(sample)
            if len(pending) == _SAMPLES_A_BATCH:
                flush()
        if pending:
            flush()


class _Lists:
    """A column of lists, each row an array that lies in the mapped file."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._first_rows: list[int] = np.cumsum([0, *map(len, column.chunks)]).tolist()

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = bisect_right(self._first_rows, row) - 1
        place = row - self._first_rows[chunk]
        start, end = self._offsets[chunk][place : place + 2]
        return self._values[chunk][start:end]

    def lengths(self) -> np.ndarray:
        """int64 ``[rows]``."""
        return np.concatenate([np.zeros(0, np.int64), *map(np.diff, self._offsets)]).astype(np.int64)

    def largest(self) -> int:
        return max((int(values.max(initial=0)) for values in self._values), default=0)


class Samples:
    """The samples ``indices`` of a file written by :func:`write_samples` (all of them by default)."""

    attention: PackedAttention | None = None

    def __init__(self, table: pa.Table, indices: np.ndarray | None = None) -> None:
        self._table = table
        self.indices = np.arange(len(table)) if indices is None else indices
        self._input_ids, self._labels = _Lists(table["input_ids"]), _Lists(table["labels"])
        self.num_tokens = self._input_ids.lengths()[self.indices]
        self.num_trained = self._column("num_trained").astype(np.int64)
        self._prompt_lengths = self._column("prompt_length")

    @classmethod
    def from_file(cls, path: Path) -> "Samples":
        return cls(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        row = int(self.indices[index])
        input_ids = self._input_ids[row]
        return {"input_ids": input_ids, "labels": self._labels[row], "lengths": [len(input_ids)]}

    def keys(self) -> np.ndarray:
        """The split key of each sample."""
        return self._column("key").astype("U32")

    def prompt_length(self, index: int) -> int:
        return int(self._prompt_lengths[index])

    def part(self, chosen: np.ndarray) -> "Samples":
        """The samples at these positions."""
        return Samples(self._table, self.indices[chosen])

    def _column(self, name: str) -> np.ndarray:
        return self._table[name].to_numpy()[self.indices]

    @property
    def longest_sample(self) -> int:
        return int(self.num_tokens.max(initial=0))

    @property
    def largest_id(self) -> int:
        return self._input_ids.largest()


class PackedRows:
    """Rows of several samples one after another; ``rows[i]`` holds the positions of row i's samples."""

    attention: PackedAttention | None = PackedAttention.POSITIONS
    """Right for most architectures; :func:`lowprec.data.fit.fit_to_model` finds the one that a model needs."""

    def __init__(self, samples: Samples, rows: Sequence[Sequence[int]]) -> None:
        self.samples = samples
        self.rows = rows
        self.num_tokens = np.array([samples.num_tokens[list(row)].sum() for row in rows], dtype=np.int64)
        self.num_trained = np.array([samples.num_trained[list(row)].sum() for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return join([self.samples[position] for position in self.rows[index]])

    @property
    def longest_sample(self) -> int:
        return self.samples.longest_sample

    @property
    def largest_id(self) -> int:
        return self.samples.largest_id


class RowsInMemory:
    """Rows of a list."""

    def __init__(
        self, items: list[Item], attention: PackedAttention | None, prompt_lengths: Sequence[int] = ()
    ) -> None:
        self.items = items
        self.attention = attention
        self.prompt_lengths = prompt_lengths
        self.num_tokens = np.array([len(item["input_ids"]) for item in items], dtype=np.int64)
        self.num_trained = np.array([(item["labels"] != IGNORE).sum() for item in items], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def prompt_length(self, index: int) -> int:
        return self.prompt_lengths[index]

    @property
    def longest_sample(self) -> int:
        return max((max(item["lengths"]) for item in self.items), default=0)

    @property
    def largest_id(self) -> int:
        return max((int(item["input_ids"].max()) for item in self.items), default=0)


def to_item(input_ids: list[int], labels: list[int]) -> Item:
    """A row of one sample."""
    return {
        "input_ids": np.array(input_ids, dtype=np.int32),
        "labels": np.array(labels, dtype=np.int32),
        "lengths": [len(input_ids)],
    }


def join(items: Sequence[Item]) -> Item:
    """One row of several. Every sample's first label is -100 already, so nothing is predicted across a border."""
    return {
        "input_ids": np.concatenate([item["input_ids"] for item in items]),
        "labels": np.concatenate([item["labels"] for item in items]),
        "lengths": [length for item in items for length in item["lengths"]],
    }
