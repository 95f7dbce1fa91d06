"""Shapes for tests and benchmarks of the grouped product, with what they cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    """Rows of each group."""
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * sum(self.sizes) * self.n * self.k

    @property
    def nbytes(self) -> int:
        """8-bit operands of the groups that have rows read once, a 16-bit result written once."""
        rows, groups = sum(self.sizes), sum(size > 0 for size in self.sizes)
        return self.k * (rows + groups * self.n) + 2 * rows * self.n


SMALL = (
    Case((1,), 16, 16),
    Case((0, 1, 0), 32, 16),
    Case((5, 0, 17, 2), 48, 32),
    Case((64, 64), 64, 128),
    Case((0, 130, 3, 0, 0), 80, 272),
)
"""Empty groups first, last and between, and sizes that are no multiple of anything."""

LAYER = Case(tuple(range(0, 128, 4)), 1536, 2048)
"""The first projection of 32 of Qwen3-30B-A3B's 128 experts, unevenly visited."""
