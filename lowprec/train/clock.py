"""Time on the device's own timeline, read without making the device wait."""

import time

import torch


class Mark:
    """A moment in the stream of work: a CUDA event, or the host's clock where work is done as it is called."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._host = time.perf_counter()

    def wait(self) -> None:
        """Return once all work before the mark is done."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Seconds between two marks that have been reached."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._host - earlier._host
