"""Which samples share a row: best-fit decreasing, so that rows of ``max_length`` are nearly full."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put samples into rows.

    The longest sample goes first, each into the fullest row that still has room (best-fit decreasing: at most 11/9 of
    the fewest rows possible, plus one; Johnson, 1973). Equal inputs give equal rows.

    Args:
        lengths: Tokens of each sample, each from 1 to ``max_length``.
        max_length: Tokens a row can hold.

    Returns:
        The positions in each row, in the order in which the rows were opened.
    """
    assert all(0 < length <= max_length for length in lengths), "samples are cut to max_length before they are packed"
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_with_room, ascending
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room]
                rooms.pop(place)
        rows[row].append(position)
        if room > length:
            left = room - length
            if left not in rows_with_room:
                rows_with_room[left] = []
                insort(rooms, left)
            rows_with_room[left].append(row)
    return rows
