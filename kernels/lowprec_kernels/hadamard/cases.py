"""Shapes for tests and benchmarks of the rotation, with what they cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    rows: int
    dim: int
    block: int

    @property
    def nbytes(self) -> int:
        """bf16 read and written once."""
        return 4 * self.rows * self.dim

    @property
    def flops(self) -> int:
        return 2 * self.block * self.rows * self.dim


SMALL = (Case(1, 16, 16), Case(64, 64, 64), Case(96, 576, 64), Case(32, 384, 128), Case(128, 48, 16), Case(5, 768, 256))
"""576 = 9 x 64 is a real model's width."""
NOISE_FLOOR_DB = 45.0
"""What a bf16 output leaves at least, whatever the rounding mode."""
