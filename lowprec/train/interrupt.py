"""SIGTERM, SIGHUP and Ctrl-C: finish the step, save, leave. A second Ctrl-C stops at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

EXIT_INTERRUPTED = 75
"""Exit code of a run that was asked to stop and has saved a checkpoint (sysexits' EX_TEMPFAIL: try again later)."""

_LAUNCHER = "TORCHELASTIC_RUN_ID"
"""Set where torch's elastic launcher (``accelerate launch``) started this process. It hands every signal that it gets
on to its processes, so that they get a Ctrl-C of the terminal twice."""

_TOLD = "\nlowprec: {}: finishing this step and saving a checkpoint; a second Ctrl-C stops at once.\n"


@dataclass
class StopRequest:
    """Set by a signal handler, read by the loop between steps."""

    signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGHUP (a terminal that closes) and SIGINT while the body runs, and say so at once: a step may
    take long."""
    request = StopRequest()
    interrupts_left = 2 if _LAUNCHER in os.environ else 1

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts_left
        if request and number == signal.SIGINT:
            interrupts_left -= 1
            if interrupts_left == 0:
                raise KeyboardInterrupt
            return
        request.signal_name = signal.Signals(number).name
        with suppress(OSError):  # nobody may be reading any more; print is not safe here: one could be under way
            os.write(2, _TOLD.format(request.signal_name).encode())

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
