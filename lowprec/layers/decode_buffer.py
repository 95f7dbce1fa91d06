"""One buffer a device, in which a weight stands decoded for the one product that reads it.

Nothing of it is ever kept for backward: there the weight is decoded again. So the memory is that of the largest layer,
whatever the number of layers, and no allocation is made in the step.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch


class DecodeBuffer:
    """Memory that is lent out to one product at a time.

    On a GPU that order is the stream's: who borrows in another stream first waits for the one before. Several host
    threads take turns. While a CUDA graph is captured each product gets memory of the graph's own.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._lock = threading.RLock()
        self._bytes: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Of the memory that is held."""
        return 0 if self._bytes is None else self._bytes.numel()

    @contextmanager
    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A tensor with arbitrary contents, valid until the ``with`` block ends: enqueue the product within it."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            yield torch.empty(shape, dtype=dtype, device=self.device)
            return
        with self._lock:
            needed = prod(shape) * dtype.itemsize
            if self.device.type == "cuda":
                self._wait_for_the_one_before()
            if self._bytes is None or self._bytes.numel() < needed:
                self._bytes = None  # given back before the larger one is asked for
                self._bytes = torch.empty(needed, dtype=torch.uint8, device=self.device)
            yield self._bytes[:needed].view(dtype).view(*shape)

    def _wait_for_the_one_before(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
            if self._bytes is not None:
                self._bytes.record_stream(stream)
        self._stream = stream


_BUFFERS: dict[torch.device, DecodeBuffer] = {}


def decode_buffer(device: torch.device) -> DecodeBuffer:
    """The one of that device, made when first asked for; ``release_decode_buffers`` frees its memory."""
    return _BUFFERS.setdefault(device, DecodeBuffer(device))


def release_decode_buffers() -> None:
    """Free all of them, as after training. The next product makes its own again."""
    _BUFFERS.clear()
