"""Tokenised samples on disk (memory-mapped Arrow), and views of them: a part, and rows of several samples."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import datasets
import numpy as np
import pyarrow as pa

from lowprec.data.build import Row

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("num_trained", pa.int32()),
        ("prompt_length", pa.int32()),
        ("key", pa.string()),
    ]
)
_ROWS_A_BATCH = 1000


class Item(TypedDict):
    """``labels`` are unshifted, -100 where nothing is trained. ``lengths``: those of the samples in the row."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]


class Rows(Protocol):
    """Map-style rows whose sizes are known without reading them."""

    num_tokens: np.ndarray
    """int64 ``[len(self)]``: tokens of each row."""
    num_trained: np.ndarray
    """int64 ``[len(self)]``: tokens of each row that give loss."""
    packed: bool
    """Whether a row may hold several samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write an Arrow stream file, a thousand rows in memory at a time."""
    pending: list[Row] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:

        def flush() -> None:
            columns = {name: [getattr(row, name) for row in pending] for name in SCHEMA.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
            pending.clear()

        for row in rows:
            pending.append(row)
            if len(pending) == _ROWS_A_BATCH:
                flush()
        if pending:
            flush()


class Samples:
    """The samples ``indices`` of a data set written by :func:`write_rows` (all of them by default)."""

    packed = False

    def __init__(self, dataset: datasets.Dataset, indices: np.ndarray | None = None) -> None:
        self._dataset = dataset
        self.indices = np.arange(len(dataset)) if indices is None else indices
        table = dataset.data.table
        lengths = np.concatenate(
            [np.zeros(0, np.int64), *(pa.compute.list_value_length(c).to_numpy() for c in table["input_ids"].chunks)]
        )
        self.num_tokens = lengths.astype(np.int64)[self.indices]
        self.num_trained = table["num_trained"].to_numpy().astype(np.int64)[self.indices]
        self._prompt_lengths = table["prompt_length"]

    @classmethod
    def from_file(cls, path: Path) -> "Samples":
        return cls(datasets.Dataset.from_file(str(path)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        row = self._dataset[int(self.indices[index])]
        return {"input_ids": row["input_ids"], "labels": row["labels"], "lengths": [len(row["input_ids"])]}

    def keys(self) -> np.ndarray:
        """The split key of each sample."""
        return np.array(self._dataset.data.table["key"].to_pylist(), dtype="U32")[self.indices]

    def prompt_length(self, index: int) -> int:
        return self._prompt_lengths[int(self.indices[index])].as_py()

    def part(self, chosen: np.ndarray) -> "Samples":
        """The samples at these positions."""
        return Samples(self._dataset, self.indices[chosen])


class PackedRows:
    """Rows of several samples one after another; ``rows[i]`` holds the positions of row i's samples."""

    packed = True

    def __init__(self, samples: Samples, rows: Sequence[Sequence[int]]) -> None:
        self.samples = samples
        self.rows = rows
        self.num_tokens = np.array([samples.num_tokens[list(row)].sum() for row in rows], dtype=np.int64)
        self.num_trained = np.array([samples.num_trained[list(row)].sum() for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        items = [self.samples[position] for position in self.rows[index]]
        return join(items)


def join(items: Sequence[Item]) -> Item:
    """One row of several. Every sample's first label is -100 already, so nothing is predicted across a border."""
    return {
        "input_ids": [token for item in items for token in item["input_ids"]],
        "labels": [label for item in items for label in item["labels"]],
        "lengths": [length for item in items for length in item["lengths"]],
    }
