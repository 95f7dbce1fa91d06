"""Items in order, errors in their turn, and no thread left behind."""

import threading
from collections.abc import Iterator

import pytest

from lowprec.data.ahead import ahead


def test_items_come_in_order() -> None:
    assert list(ahead(iter(range(50)))) == list(range(50))


def test_an_error_comes_in_its_turn() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("here")

    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(KeyError, match="here"):
        next(items)


def test_closing_stops_the_thread_and_closes_the_source() -> None:
    closed = threading.Event()
    made = []

    def endless() -> Iterator[int]:
        try:
            while True:
                made.append(len(made))
                yield made[-1]
        finally:
            closed.set()

    before = threading.active_count()
    items = ahead(endless(), depth=2)
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert closed.is_set() and threading.active_count() == before
    assert len(made) <= 4  # no further ahead than asked
