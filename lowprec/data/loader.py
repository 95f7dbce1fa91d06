"""Batches: one :class:`StepBatch` an optimizer step, the same samples however the step is divided.

An effective batch is the next ``per_device_batch_size * gradient_accumulation_steps * world_size`` rows of the epoch's
order (:mod:`lowprec.data.order`), longest first, dealt out micro-batch by
micro-batch and process by process: the longest rows share a micro-batch, which saves padding, and show at once whether
they fit into memory. The sizes of all rows are known, so every process knows the token counts of the whole step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from lowprec.data.ahead import ahead
from lowprec.data.collate import Inputs, collate, trained_positions
from lowprec.data.order import EpochOrder, Order, State, Step
from lowprec.data.prepare import PreparedData
from lowprec.data.rows import Rows
from lowprec.data.samples import RowsInMemory, to_item
from lowprec.data.stream import Stream, StreamOrder
from lowprec.errors import UserError


@dataclass(kw_only=True, slots=True)
class StepBatch:
    """What one optimizer step takes."""

    micro_batches: list[Inputs]
    """This process's part, see :func:`lowprec.data.collate.collate` for the tensors; beside them
    ``trained_positions``, int64, where in the flattened batch the next token is trained. All processes have equally
    many; one that has no row left gets a row of padding."""
    num_trained_tokens: int
    """Tokens that give loss, in this process's part."""
    num_trained_tokens_global: int
    """Tokens that give loss, in the whole effective batch: what the loss is divided by."""
    num_tokens: int
    """Tokens without padding, in this process's part."""
    num_tokens_global: int
    num_padding: int
    """Padding tokens in this process's part."""
    epoch: float
    """Epochs after this step."""
    state: State
    """The loader's position after this step."""


@dataclass(kw_only=True, slots=True)
class EvalBatch:
    """One batch of this process; the counts are of this process's part."""

    inputs: Inputs
    num_trained_tokens: int
    num_tokens: int
    num_padding: int


def divide(chosen: np.ndarray, lengths: np.ndarray, batch_size: int, world_size: int) -> list[list[np.ndarray]]:
    """Deal the rows of an effective batch out: ``[micro-batch][process]`` of row numbers, longest rows first.

    Args:
        chosen: int ``[rows]``, the rows of the step.
        lengths: int ``[rows]``, tokens of each.
        batch_size: Rows of a micro-batch on one process.
        world_size: Processes.
    """
    chosen = chosen[np.argsort(-lengths, kind="stable")]
    per_micro_batch = batch_size * world_size
    return [
        np.array_split(chosen[start : start + per_micro_batch], world_size)
        for start in range(0, len(chosen), per_micro_batch)
    ]


class StepLoader:
    """Yields a :class:`StepBatch` an optimizer step, for ever: epochs follow each other, each in its own order.

    The last rows of an epoch that do not fill an effective batch are trained as a smaller one.

    Args:
        prepared: Of :func:`lowprec.data.prepare.prepare_data`.
        per_device_batch_size: Rows of a micro-batch on one process.
        gradient_accumulation_steps: Micro-batches of a full step.
        rank: This process, from 0.
        world_size: Number of processes.
        seed: Of the permutations.
        pad_token_id: For padding; it is never trained nor seen.
        pad_to_multiple_of: The rows of a micro-batch are padded to the next multiple above the longest, though not
            beyond ``data.max_length``.
        device: Where the tensors go; a copy to CUDA comes from pinned memory and does not wait.
    """

    def __init__(
        self,
        prepared: PreparedData,
        *,
        per_device_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_token_id: int,
        pad_to_multiple_of: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        train = prepared.train
        self._order: Order
        if isinstance(train, Stream):
            self._order = StreamOrder(train, seed, prepared.fingerprint)
        else:
            self._order = EpochOrder(train, seed, prepared.fingerprint)
        self.batch_size = per_device_batch_size
        self.effective_batch_size = per_device_batch_size * gradient_accumulation_steps * world_size
        self.rank, self.world_size = rank, world_size
        self._max_length, self._attention = prepared.summary.max_length, prepared.evaluation.attention
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of
        self.device = torch.device(device) if device is not None else None
        if self.device is not None and self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._state = self._order.first_state()

    @property
    def steps_per_epoch(self) -> int | None:
        """None for a stream."""
        return -(-len(self._order.rows) // self.effective_batch_size) if isinstance(self._order, EpochOrder) else None

    def num_steps(self, num_epochs: float) -> int:
        """Optimizer steps in so many epochs, at least one.

        Raises:
            UserError: the data are a stream, whose length is not known.
        """
        per_epoch = self.steps_per_epoch
        if per_epoch is None:
            raise UserError("data.streaming=true reads data of unknown length: set train.max_steps.")
        return max(1, round(num_epochs * per_epoch))

    @property
    def padding_share(self) -> float | None:
        """Share of padding among all tokens of the first epoch, over all processes; None for a stream."""
        if not isinstance(self._order, EpochOrder):
            return None
        padding, tokens = self._first_epoch(self._order)
        return padding / (padding + tokens)

    @property
    def mean_row_length(self) -> float | None:
        """Tokens of a row of the first epoch with its padding; None for a stream."""
        if not isinstance(self._order, EpochOrder):
            return None
        return sum(self._first_epoch(self._order)) / len(self._order.rows)

    def _first_epoch(self, order: EpochOrder) -> tuple[int, int]:
        """Tokens of padding, and the others."""
        padding = tokens = 0
        lengths, permutation = order.rows.num_tokens, order.permutation(0)
        for start in range(0, len(permutation), self.effective_batch_size):
            chosen = permutation[start : start + self.effective_batch_size]
            for part in chain.from_iterable(divide(chosen, lengths[chosen], self.batch_size, self.world_size)):
                tokens += int(lengths[part].sum())
                padding += int((self._padded(lengths[part].max(initial=0)) - lengths[part]).sum())
        return padding, tokens

    def state_dict(self) -> State:
        """The position after the last step that was yielded, in rows: it holds for any division into processes."""
        return dict(self._state)

    def load_state_dict(self, state: State) -> None:
        """Go on from a position; takes effect with the next ``iter``.

        Raises:
            UserError: the position is one in other data, or in another order.
        """
        if state["data"] != self._state["data"]:
            raise UserError(
                "the training data are not those of the checkpoint (their contents, their split or their packing), so "
                "its place in them means nothing. Resume with the same data, or start in another train.output_dir."
            )
        if state["seed"] != self._state["seed"]:
            raise UserError(
                f"the checkpoint was written with train.seed={state['seed']}, which orders the samples, and the recipe "
                f"has train.seed={self._state['seed']}. Resume with the same, or start in another train.output_dir."
            )
        if state.get("order") != self._state.get("order"):
            raise UserError(
                "the checkpoint was written by another version of lowprec, which ordered the samples otherwise. Resume "
                "with that version, or start in another train.output_dir."
            )
        self._state = dict(state)

    def longest(self, num_rows: int) -> Inputs:
        """The largest micro-batch of so many rows that can come, on the device. Of a stream, whose rows are not known,
        rows of ``data.max_length`` tokens.
        """
        if isinstance(self._order, EpochOrder):
            rows: Rows = self._order.rows
            part = np.argsort(-rows.num_tokens, kind="stable")[:num_rows]
        else:
            item = to_item([self.pad_token_id] * self._max_length, [self.pad_token_id] * self._max_length)
            rows, part = RowsInMemory([item], self._attention), np.zeros(num_rows, dtype=np.int64)
        inputs = self._collated(rows, part)
        return _to(inputs, self.device) if self.device is not None else inputs

    def __iter__(self) -> Iterator[StepBatch]:
        for batch in ahead(map(self._batch, self._order.steps(self._state, self.effective_batch_size))):
            if self.device is not None:
                batch.micro_batches = [_to(inputs, self.device) for inputs in batch.micro_batches]
            self._state = dict(batch.state)
            yield batch

    def _batch(self, step: Step) -> StepBatch:
        rows, chosen = step.rows, step.chosen
        dealt = divide(chosen, rows.num_tokens[chosen], self.batch_size, self.world_size)
        parts = [micro_batch[self.rank] for micro_batch in dealt]
        micro_batches = [self._collated(rows, part) for part in parts]
        mine = np.concatenate(parts)
        num_tokens = int(rows.num_tokens[mine].sum())
        return StepBatch(
            micro_batches=micro_batches,
            num_trained_tokens=int(rows.num_trained[mine].sum()),
            num_trained_tokens_global=int(rows.num_trained[chosen].sum()),
            num_tokens=num_tokens,
            num_tokens_global=int(rows.num_tokens[chosen].sum()),
            num_padding=sum(inputs["input_ids"].numel() for inputs in micro_batches) - num_tokens,
            epoch=step.epoch,
            state=step.state,
        )

    def _padded(self, longest: int) -> int:
        """Tokens of the rows of a micro-batch."""
        multiple = -(-int(longest) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return max(int(longest), min(multiple, self._max_length))

    def _collated(self, rows: Rows, part: np.ndarray) -> Inputs:
        length = self._padded(rows.num_tokens[part].max(initial=2))
        items = [rows[int(i)] for i in part]
        inputs = _with_positions(collate(items, self.pad_token_id, attention=rows.attention, length=length))
        if self.device is None or self.device.type != "cuda":
            return inputs
        with torch.cuda.device(self.device):  # a new thread stands on device 0, and would open a context there
            return {name: tensor.pin_memory() for name, tensor in inputs.items()}


def eval_batches(
    evaluation: Rows,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    pad_token_id: int,
    max_samples: int | None = None,
    pin_memory: bool = False,
) -> Iterator[EvalBatch]:
    """Every held-out row once, over all processes; each process yields equally many batches.

    Args:
        evaluation: ``PreparedData.evaluation``.
        batch_size: Rows of a batch on one process.
        rank: This process, from 0.
        world_size: Number of processes.
        pad_token_id: For padding.
        max_samples: Take only the first so many rows.
        pin_memory: Put the tensors where copies to a GPU do not wait.
    """
    chosen = np.arange(len(evaluation))[:max_samples]

    def batches() -> Iterator[EvalBatch]:
        for micro_batch in divide(chosen, evaluation.num_tokens[chosen], batch_size, world_size):
            part = micro_batch[rank]
            items = [evaluation[int(i)] for i in part]
            inputs = _with_positions(collate(items, pad_token_id, attention=evaluation.attention))
            if pin_memory:
                inputs = {name: value.pin_memory() for name, value in inputs.items()}
            num_tokens = int(evaluation.num_tokens[part].sum())
            yield EvalBatch(
                inputs=inputs,
                num_trained_tokens=int(evaluation.num_trained[part].sum()),
                num_tokens=num_tokens,
                num_padding=inputs["input_ids"].numel() - num_tokens,
            )

    return ahead(batches())


def _with_positions(inputs: Inputs) -> Inputs:
    """Add ``trained_positions``, int64 ``[trained tokens]``: where in the flattened batch the next token is trained.
    Known here, they spare the device the other tokens' logits, and the host a wait."""
    return inputs | {"trained_positions": trained_positions(inputs["labels"])}


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
