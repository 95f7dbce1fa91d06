"""States in memory: beside the weights (``gpu``), or in host memory (``cpu``)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowprec.optim.disk import HostMemory
from lowprec.optim.layout import Chunk, initialise
from lowprec.optim.saved_chunks import SavedChunks
from lowprec.optim.traffic import Traffic


class MemoryStore:
    """A buffer for every chunk, from ``allocate(chunk)`` (uint8, its bytes) at the chunk's first read.

    ``memory``: what the buffers are cut from, to be closed with the store.
    """

    resident = True

    def __init__(
        self,
        chunks: list[Chunk],
        params: Sequence[Tensor],
        allocate: Callable[[Chunk], Tensor],
        memory: HostMemory | None = None,
    ):
        self.chunks = chunks
        self._params = params
        self._allocate = allocate
        self._memory = memory
        self._buffers: dict[int, Tensor] = {}
        self._reserved: dict[int, Tensor] = {}
        self.traffic: Traffic | None = None  # nothing is moved to a disk
        self.notes: list[str] = []

    def reserve(self) -> None:
        """The states themselves begin at the first read, with the weights that there are then."""
        for chunk in self.chunks:
            if chunk.index not in self._buffers | self._reserved:
                self._reserved[chunk.index] = self._allocate(chunk)

    def prefetch(self, order: Sequence[Chunk]) -> None:
        """Nothing to do: the states are here."""

    def read(self, chunk: Chunk) -> Tensor:
        if chunk.index not in self._buffers:
            reserved = self._reserved.pop(chunk.index, None)
            buffer = self._allocate(chunk) if reserved is None else reserved
            initialise(chunk, buffer, self._params)
            self._buffers[chunk.index] = buffer
        return self._buffers[chunk.index]

    peek = read

    def write(self, chunk: Chunk, buffer: Tensor, after: "torch.cuda.Event | None" = None) -> None:
        assert buffer is self._buffers[chunk.index], "a chunk is updated in its own buffer"

    def flush(self) -> None:
        """Nothing to do: an update is in place."""

    def close(self) -> None:
        self._buffers.clear()
        self._reserved.clear()
        if self._memory is not None:
            self._memory.close()

    def snapshot(self, folder: Path) -> None:
        return None

    def restore(self, saved: SavedChunks) -> bool:
        return False
