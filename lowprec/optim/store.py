"""The protocol of a state store: who keeps the bytes of the chunks (layout.py), and when they may be touched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lowprec.optim.layout import Chunk
from lowprec.optim.saved_chunks import SavedChunks
from lowprec.optim.traffic import Traffic


class StateStore(Protocol):
    """Keeps the chunks of one optimizer. Each ``read`` is followed by a ``write`` before the chunk's next ``read``.

    ``traffic`` is None where no disk takes part; ``notes`` are sentences for the user.
    ``resident``: the buffers of ``read`` stay valid together, so that all chunks may be updated at once.
    """

    chunks: list[Chunk]
    resident: bool
    notes: list[str]

    @property
    def traffic(self) -> Traffic | None: ...

    def reserve(self) -> None:
        """Take all memory now that the states will lie in."""
        ...

    def prefetch(self, order: Sequence[Chunk]) -> None:
        """Announce the chunks that will be read next, in that order; a store that reads ahead begins now."""
        ...

    def read(self, chunk: Chunk) -> Tensor:
        """The chunk's bytes, uint8 [>= chunk.nbytes], to be updated on the current stream of the weights' device."""
        ...

    def write(self, chunk: Chunk, buffer: Tensor, after: "torch.cuda.Event | None" = None) -> None:
        """Take the updated ``buffer`` of ``read`` back; its bytes are complete once ``after`` has happened."""
        ...

    def peek(self, chunk: Chunk) -> Tensor:
        """The chunk's bytes on any device, to look at until the next call; needs no ``write``."""
        ...

    def flush(self) -> None:
        """Wait until everything written is where it stays."""
        ...

    def close(self) -> None:
        """Give back memory, files and locks."""
        ...

    def snapshot(self, folder: Path) -> dict | None:
        """Put a durable version of all chunks into ``folder``; returns what ``SavedChunks`` needs (JSON-able).

        None from a store that keeps no files: its states are then written by parameter name.
        """
        ...

    def restore(self, saved: SavedChunks) -> bool:
        """Continue from the files of a checkpoint, which are only read; False where they are cut otherwise."""
        ...
