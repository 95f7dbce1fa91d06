"""Shapes for tests and benchmarks of the gated product's casts, with what they cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    rows: int
    dim: int

    @property
    def forward_bytes(self) -> int:
        """Gate and up in 16 bits read, codes and scales written."""
        return 5 * self.rows * self.dim + 4 * self.rows

    @property
    def backward_bytes(self) -> int:
        """Error, gate and up in 16 bits and the partner's scales read, two codes with their scales written."""
        return 8 * self.rows * self.dim + 12 * self.rows


SMALL = (Case(1, 16), Case(3, 64), Case(17, 336), Case(5, 1040))
LARGE = (Case(8192, 8192), Case(4096, 14336))
"""The MLPs of Llama-3.2-1B and Llama-3-8B."""
