"""Shapes for tests and benchmarks of the norm's gradients, with what they cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    rows: int
    dim: int

    @property
    def nbytes(self) -> int:
        """Gradient and input in 16 bits read, the input's gradient written."""
        return 6 * self.rows * self.dim


SMALL = (Case(1, 8), Case(3, 64), Case(37, 128), Case(9, 576), Case(5, 1040), Case(2, 4096))
LARGE = (Case(8192, 2048), Case(4096, 4096), Case(131072, 128))
"""Llama-3.2-1B and 3-8B, and the norm of the queries' heads in Qwen3."""
