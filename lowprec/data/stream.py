"""Data that are read while training: in blocks, so that a run can go on exactly where it stopped.

A block is ``data.shuffle_buffer`` records. It is tokenised, packed and shuffled as a whole, with a seed of its own,
while the block before it is trained. The state of a run is the stream's own (``datasets.IterableDataset.state_dict``)
at the start of the block, and the number of rows taken from it: resuming reads that block again and gives the very rows
that were to come. A reservoir that is refilled with every record could not be restored without storing what it holds.

Every process reads the whole stream and takes its part of each step, so that the token counts of a step are known
without communication, and a step has the same rows on any number of processes. Reading and tokenising a sample costs
about a millisecond of one core, far less than training on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from lowprec.data.ahead import ahead
from lowprec.data.build import Builder, StoredSample
from lowprec.data.order import State, Step
from lowprec.data.packing import pack
from lowprec.data.records import Record, RecordError
from lowprec.data.rows import Item, PackedAttention
from lowprec.data.samples import RowsInMemory, join, to_item
from lowprec.data.sources import Source
from lowprec.errors import UserError

if TYPE_CHECKING:
    import datasets


@dataclass(kw_only=True, slots=True)
class _Block:
    """The rows of a block in their order, and the state at its start."""

    items: list[Item]
    state: State
    ends_epoch: bool


class Stream:
    """The training samples of a stream.

    Args:
        source: Where the records come from.
        builder: Turns them into samples and counts them; its options are the recipe's group ``data``.
        held_out: Keys of the samples at the head that are held out. Equal contents later in the stream are left out.
        skip: How many records at the head were held out.
    """

    def __init__(self, source: Source, builder: Builder, *, held_out: frozenset[str], skip: int) -> None:
        self.source, self.builder = source, builder
        self.data = builder.options
        self.held_out, self.skip = held_out, skip
        self.attention = PackedAttention.POSITIONS if self.data.packing else None

    @property
    def longest_sample(self) -> int:
        """What it may be."""
        return self.data.max_length

    def records(self) -> "datasets.IterableDataset":
        """The records after the held-out ones."""
        records = self.source.stream()
        if self.data.max_samples is not None:
            records = records.take(self.data.max_samples)
        return records.skip(self.skip) if self.skip else records

    def rows(self, records: list[dict[str, Any]], seed: list[int]) -> list[Item]:
        """The rows of a block, shuffled.

        Raises:
            UserError: a record that cannot be used.
        """
        samples = [
            sample
            for record in records
            for sample in stream_samples(record, self.builder, self.source.name)
            if sample.key not in self.held_out
        ]
        items = to_items(samples, self.data.max_length if self.data.packing else None)
        return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def stream_samples(record: dict[str, Any], builder: Builder, path: str) -> list[StoredSample]:
    """The samples of one record of ``Source.stream``.

    Raises:
        UserError: what is wrong with it, and where it is.
    """
    try:
        return builder.samples(Record(**{name: record[name] for name in ("where", "fields", "problem", "split_key")}))
    except RecordError as error:
        raise UserError(f"data.path={path}: {record['where']} cannot be used: {error}") from error


def to_items(samples: list[StoredSample], row_length: int | None) -> list[Item]:
    """One row a sample, or packed rows of ``row_length``."""
    items = [to_item(sample.input_ids, sample.labels) for sample in samples]
    if row_length is None:
        return items
    rows = pack([len(item["input_ids"]) for item in items], row_length)
    return [join([items[position] for position in row]) for row in rows]


class StreamOrder:
    """The steps of a stream; at its end it begins anew, shuffled otherwise. ``fingerprint`` tells what makes them."""

    def __init__(self, stream: Stream, seed: int, fingerprint: str) -> None:
        self.stream = stream
        self.seed = seed
        self.fingerprint = fingerprint

    def first_state(self) -> State:
        return {"epoch": 0, "block": 0, "taken": 0, "records": None, "seed": self.seed, "data": self.fingerprint}

    def steps(self, state: State, step_rows: int) -> Iterator[Step]:
        taken = state["taken"]
        pending: list[Item] = []
        for block in ahead(self._blocks(state), depth=1):
            while True:
                piece = block.items[taken : taken + step_rows - len(pending)]
                pending += piece
                taken += len(piece)
                at_end = taken >= len(block.items)
                if len(pending) == step_rows or (pending and at_end and block.ends_epoch):
                    rows = RowsInMemory(pending, self.stream.attention)
                    after = {**block.state, "taken": taken}
                    yield Step(rows=rows, chosen=np.arange(len(rows)), state=after, epoch=float(after["epoch"]))
                    pending = []
                if at_end:
                    break
            taken = 0

    def _blocks(self, state: State) -> Iterator[_Block]:
        epoch, number, position = state["epoch"], state["block"], state["records"]
        size = self.stream.data.shuffle_buffer
        while True:
            dataset = self.stream.records()
            if position is not None:
                dataset.load_state_dict(position)
            records = iter(dataset)
            found = number > 0
            ends_epoch = False
            while not ends_epoch:
                position = dataset.state_dict()
                read = list(islice(records, size))
                ends_epoch = len(read) < size
                items = self.stream.rows(read, [self.seed, epoch, number])
                found = found or bool(items)
                block_state = {**state, "epoch": epoch, "block": number, "records": position}
                yield _Block(items=items, state=block_state, ends_epoch=ends_epoch)
                number += 1
            if not found:
                raise UserError(
                    f"data.path={self.stream.source.name}: after the {self.stream.skip} records that are held out, the "
                    "stream holds no sample to train on; lower data.eval_samples, or set data.eval_path."
                )
            epoch, number, position = epoch + 1, 0, None
