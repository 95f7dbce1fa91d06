"""Read, tokenise and collate on a thread of its own, so that the device never waits for the next batch."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

_DEPTH = 3
"""Batches that lie ready. More would only hold memory: making one takes far less time than a step."""


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield what ``items`` yields, made up to ``_DEPTH`` items ahead on a background thread.

    An exception of ``items`` is raised here in its turn. Closing this generator stops the thread.
    """
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue()
    room = threading.Semaphore(_DEPTH)
    stopping = threading.Event()

    def work() -> None:
        try:
            while room.acquire() and not stopping.is_set():
                ready.put((True, next(items)))
        except StopIteration:
            ready.put((False, None))
        except BaseException as error:  # noqa: BLE001  # raised again by the consumer
            ready.put((False, error))

    thread = threading.Thread(target=work, name="lowprec-data", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = ready.get()
            if not is_item:
                if isinstance(value, BaseException):
                    raise value
                return
            room.release()
            yield value  # type: ignore[misc]
    finally:
        stopping.set()
        room.release()
        thread.join()
