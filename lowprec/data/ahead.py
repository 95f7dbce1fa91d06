"""Read, tokenise and collate on a thread of its own, so that the device never waits for the next batch."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], *, depth: int = 3) -> Iterator[T]:
    """Yield what ``items`` yields, made up to ``depth`` items ahead on a background thread.

    An exception of ``items`` is raised here in its turn. Closing this generator stops the thread and closes ``items``.
    """
    # Written in C: a Queue and a Semaphore are a dozen calls of Python for each item, beside which a step may wait.
    ready: queue.SimpleQueue[tuple[bool, T | BaseException | None]] = queue.SimpleQueue()
    room: queue.SimpleQueue[bool] = queue.SimpleQueue()
    for _ in range(depth):
        room.put(True)
    stopping = threading.Event()

    def work() -> None:
        try:
            while room.get() and not stopping.is_set():
                ready.put((True, next(items)))
        except StopIteration:
            ready.put((False, None))
        except BaseException as error:  # noqa: BLE001  # raised again by the consumer
            ready.put((False, error))
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name="lowprec-data", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = ready.get()
            if not is_item:
                if isinstance(value, BaseException):
                    raise value
                return
            room.put(True)
            yield value  # type: ignore[misc]
    finally:
        stopping.set()
        room.put(True)
        thread.join()
