"""The caching allocator's rules, on sequences whose result is known."""

from hypothesis import given
from hypothesis import strategies as st

from lowprec.plan.allocator import CachingAllocator, rounded
from lowprec.plan.tape import Event

MIB = 2**20


def replay(*events: tuple[str, int], expandable: bool = False) -> CachingAllocator:
    allocator = CachingAllocator(expandable=expandable)
    allocator.replay(Event("", size > 0, name, abs(size), "", False, 0) for name, size in events)
    return allocator


def test_blocks_are_multiples_of_512():
    assert [rounded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_small_blocks_share_a_segment_of_2_mib():
    assert replay(("a", 100), ("b", 1 * MIB)).reserved == 2 * MIB
    assert replay(("a", 1 * MIB), ("b", 1 * MIB), ("c", 512)).reserved == 4 * MIB


def test_blocks_up_to_10_mib_share_20_mib():
    assert replay(("a", 9 * MIB), ("b", 9 * MIB)).reserved == 20 * MIB
    assert replay(("a", 9 * MIB), ("b", 9 * MIB), ("c", 9 * MIB)).reserved == 40 * MIB


def test_large_blocks_have_their_own_segment_in_steps_of_2_mib():
    assert replay(("a", 33 * MIB + 1)).reserved == 34 * MIB


def test_freed_blocks_are_used_again_and_merged():
    assert replay(("a", 30 * MIB), ("a", -1), ("b", 12 * MIB), ("c", 12 * MIB)).reserved == 30 * MIB
    merged = [("a", 12 * MIB), ("b", 12 * MIB), ("a", -1), ("b", -1), ("c", 24 * MIB)]
    assert replay(*merged).reserved == 48 * MIB  # two segments cannot be joined
    assert replay(*merged, expandable=True).reserved == 40 * MIB  # 20 and 20, which can


def test_fragmentation_is_what_expandable_segments_save():
    holes = [(f"{i}", 24 * MIB) for i in range(4)] + [("0", -1), ("1", -1), ("2", -1), ("x", 70 * MIB)]
    assert replay(*holes).reserved == (4 * 24 + 70) * MIB
    assert replay(*holes, expandable=True).reserved == 100 * MIB


@given(st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=30), st.booleans(), st.randoms(use_true_random=False))
def test_what_is_reserved_holds_what_is_allocated(sizes, expandable, random):
    allocator, alive, total = CachingAllocator(expandable=expandable), {}, 0
    for number, size in enumerate(sizes):
        allocator.replay([Event("", True, number, size, "", False, 0)])
        alive[number] = rounded(size)
        assert allocator.reserved >= sum(alive.values())
        if random.random() < 0.4:
            gone = random.choice(sorted(alive))
            allocator.replay([Event("", False, gone, alive.pop(gone), "", False, 0)])
        total += size
    held = sorted((block.address, block.size) for block, _ in allocator._blocks.values())
    assert all(a + n <= b for (a, n), (b, _) in zip(held, held[1:], strict=False)), "two blocks overlap"
