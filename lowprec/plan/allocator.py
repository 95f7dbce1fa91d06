"""How much device memory PyTorch's caching allocator reserves for a sequence of allocations.

The rules and constants are those of c10/cuda/CUDACachingAllocator.cpp. Blocks are multiples of 512 bytes, found by
best fit. Without expandable segments, memory is taken in segments of 2 MiB (blocks up to 1 MiB), 20 MiB (up to 10 MiB)
or the block rounded up to 2 MiB, which are split; with them, one range of addresses for small and one for large blocks
grows by pages of 2 MiB and 20 MiB, so that only holes between living blocks are lost.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

from lowprec.plan.tape import Event

MIN_BLOCK = 512
SMALL = 1 << 20
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
MIN_LARGE = 10 << 20
ROUND_LARGE = 2 << 20


def rounded(nbytes: int) -> int:
    """The bytes of the block that is handed out."""
    return max(-(-nbytes // MIN_BLOCK) * MIN_BLOCK, MIN_BLOCK) if nbytes else 0


class _Block:
    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, address: int, size: int):
        self.address, self.size, self.free = address, size, False
        self.before: _Block | None = None
        self.after: _Block | None = None


class _Pool:
    """Free blocks in the order of size and address."""

    def __init__(self) -> None:
        self.sorted: list[tuple[int, int]] = []
        self.blocks: dict[int, _Block] = {}

    def add(self, block: _Block) -> None:
        block.free = True
        self.blocks[block.address] = block
        insort(self.sorted, (block.size, block.address))

    def remove(self, block: _Block) -> None:
        block.free = False
        del self.blocks[block.address]
        del self.sorted[bisect_left(self.sorted, (block.size, block.address))]

    def best_fit(self, size: int) -> _Block | None:
        place = bisect_left(self.sorted, (size, 0))
        return self.blocks[self.sorted[place][1]] if place < len(self.sorted) else None


class CachingAllocator:
    """Replays allocations. ``reserved`` and ``peak_reserved`` are bytes."""

    def __init__(self, *, expandable: bool):
        self.reserved = self.peak_reserved = 0
        self._expandable = expandable
        self._pools = {True: _Pool(), False: _Pool()}
        self._ends: dict[bool, _Block | None] = {True: None, False: None}
        self._next_address = {True: 1 << 60, False: 0}
        self._blocks: dict[object, tuple[_Block, bool]] = {}

    def replay(self, events: Iterable[Event]) -> int:
        """Play the events of a tape; returns the peak."""
        for _, comes, identity, nbytes, *_ in events:
            if not nbytes:
                continue
            if comes:
                self._allocate(identity, rounded(nbytes))
            else:
                self._free(identity)
        return self.peak_reserved

    def _allocate(self, identity: object, size: int) -> None:
        small = size <= SMALL
        pool = self._pools[small]
        block = pool.best_fit(size)
        if block is None:
            block = self._grow(small, size)
        else:
            pool.remove(block)
        rest = block.size - size
        if rest >= (MIN_BLOCK if small else SMALL + 1) or (self._expandable and rest >= MIN_BLOCK):
            self._split(pool, block, size, small)
        self._blocks[identity] = block, small

    def _grow(self, small: bool, size: int) -> _Block:
        """A new segment, or with expandable segments more pages behind the last block."""
        if not self._expandable:
            if small:
                segment = SMALL_SEGMENT
            elif size < MIN_LARGE:
                segment = LARGE_SEGMENT
            else:
                segment = -(-size // ROUND_LARGE) * ROUND_LARGE
            return self._new(small, segment, None)
        page = SMALL_SEGMENT if small else LARGE_SEGMENT
        end = self._ends[small]
        if end is not None and end.free:  # the free tail is extended
            self._pools[small].remove(end)
            missing = -(-(size - end.size) // page) * page
            end.size += missing
            self._next_address[small] += missing
            self._count(missing)
            return end
        return self._new(small, -(-size // page) * page, end)

    def _new(self, small: bool, size: int, before: _Block | None) -> _Block:
        block = _Block(self._next_address[small], size)
        self._next_address[small] += size
        if before is not None:
            before.after, block.before = block, before
        self._ends[small] = block
        self._count(size)
        return block

    def _count(self, nbytes: int) -> None:
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _split(self, pool: _Pool, block: _Block, size: int, small: bool) -> None:
        rest = _Block(block.address + size, block.size - size)
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        if self._ends[small] is block:
            self._ends[small] = rest
        pool.add(rest)

    def _free(self, identity: object) -> None:
        block, small = self._blocks.pop(identity)
        pool = self._pools[small]
        for neighbour in (block.before, block.after):
            if neighbour is None or not neighbour.free:
                continue
            pool.remove(neighbour)
            first, second = (neighbour, block) if neighbour is block.before else (block, neighbour)
            first.size += second.size
            first.after = second.after
            if second.after is not None:
                second.after.before = first
            if self._ends[small] is second:
                self._ends[small] = first
            block = first
        pool.add(block)
