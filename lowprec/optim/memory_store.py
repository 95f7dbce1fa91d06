"""States in memory: beside the weights (``gpu``), or in host memory (``cpu``)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowprec.optim.layout import Chunk, initialise


class MemoryStore:
    """A buffer for every chunk, allocated at its first read: on ``device``, or where the chunk's parameters are."""

    resident = True

    def __init__(self, chunks: list[Chunk], params: Sequence[Tensor], device: torch.device | None = None):
        self.chunks = chunks
        self._params = params
        self._device = device
        self._buffers: dict[int, Tensor] = {}

    def prefetch(self, order: Sequence[Chunk]) -> None:
        """Nothing to do: the states are here."""

    def read(self, chunk: Chunk) -> Tensor:
        if chunk.index not in self._buffers:
            buffer = self._allocate(chunk.nbytes, self._device or self._params[chunk.pieces[0].parameter].device)
            initialise(chunk, buffer, self._params)
            self._buffers[chunk.index] = buffer
        return self._buffers[chunk.index]

    def _allocate(self, nbytes: int, device: torch.device) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    peek = read

    def write(self, chunk: Chunk, buffer: Tensor, after: "torch.cuda.Event | None" = None) -> None:
        assert buffer is self._buffers[chunk.index], "a chunk is updated in its own buffer"

    def flush(self) -> None:
        """Nothing to do: an update is in place."""

    def close(self) -> None:
        self._buffers.clear()

    def snapshot(self, folder: Path) -> None:
        return None

    def restore(self, folder: Path, manifest: dict) -> None:
        raise AssertionError("a memory store writes no files")
