"""Brings the chunks of a store in host memory to the GPU and back, on streams of their own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowprec.optim.layout import Chunk
from lowprec.optim.saved_chunks import SavedChunks
from lowprec.optim.store import StateStore

# Device buffers: one uploads, one is updated, one downloads, one waits for its turn.
DEPTH = 4


class StagedStore:
    """Uploads what ``host`` reads, and downloads it after the update; the host waits for neither."""

    resident = False

    def __init__(self, host: StateStore, device: torch.device):
        self.host = host
        self.chunks = host.chunks
        self.traffic = host.traffic
        self.notes = host.notes
        largest = max((chunk.nbytes for chunk in host.chunks), default=0)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(DEPTH)]
        self._drained: list[torch.cuda.Event | None] = [None] * DEPTH
        self._downloaded: dict[int, torch.cuda.Event] = {}
        self._held: dict[int, tuple[Tensor, int]] = {}
        self._turn = 0
        # A number: of a device's name, CUDA's state is asked for 20 us.
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def reserve(self) -> None:
        self.host.reserve()

    def prefetch(self, order: Sequence[Chunk]) -> None:
        self.host.prefetch(order)

    def read(self, chunk: Chunk) -> Tensor:
        host = self.host.read(chunk)
        place, self._turn = self._turn, (self._turn + 1) % DEPTH
        buffer = self._buffers[place][: chunk.nbytes]
        for event in (self._drained[place], self._downloaded.get(chunk.index)):
            if event is not None:
                self._up.wait_event(event)
        with torch.cuda.stream(self._up):
            buffer.copy_(host[: chunk.nbytes], non_blocking=True)
        torch.cuda.current_stream(self._device).wait_stream(self._up)
        self._held[chunk.index] = host, place
        return buffer

    def write(self, chunk: Chunk, buffer: Tensor, after: "torch.cuda.Event | None" = None) -> None:
        host, place = self._held.pop(chunk.index)
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            host[: chunk.nbytes].copy_(buffer, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # threads that wait for it sleep: others need their cores
            done.record()
        self._drained[place] = self._downloaded[chunk.index] = done
        self.host.write(chunk, host, after=done)

    def peek(self, chunk: Chunk) -> Tensor:
        self._down.synchronize()
        return self.host.peek(chunk)

    def flush(self) -> None:
        self._down.synchronize()
        self.host.flush()

    def close(self) -> None:
        self._down.synchronize()
        self.host.close()
        self._buffers.clear()

    def snapshot(self, folder: Path) -> dict[str, Any] | None:
        self.flush()
        return self.host.snapshot(folder)

    def restore(self, saved: SavedChunks) -> bool:
        return self.host.restore(saved)
