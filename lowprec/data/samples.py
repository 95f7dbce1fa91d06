"""Tokenised samples on disk (memory-mapped Arrow), and views of them: a part, and rows of several samples."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
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


class Samples:
    """The samples ``indices`` of a data set written by :func:`write_samples` (all of them by default)."""

    attention: PackedAttention | None = None

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

    @property
    def longest_sample(self) -> int:
        return int(self.num_tokens.max(initial=0))

    @property
    def largest_id(self) -> int:
        chunks = self._dataset.data.table["input_ids"].chunks
        return max((pa.compute.max(chunk.flatten()).as_py() or 0 for chunk in chunks), default=0)

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
        trained = [sum(label != IGNORE for label in item["labels"]) for item in items]
        self.num_trained = np.array(trained, dtype=np.int64)

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
        return max((max(item["input_ids"]) for item in self.items), default=0)


def join(items: Sequence[Item]) -> Item:
    """One row of several. Every sample's first label is -100 already, so nothing is predicted across a border."""
    return {
        "input_ids": [token for item in items for token in item["input_ids"]],
        "labels": [label for item in items for label in item["labels"]],
        "lengths": [length for item in items for length in item["lengths"]],
    }
