"""Shapes for tests and benchmarks of the look-up in host memory, with what it costs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    dim: int

    @property
    def link_bytes(self) -> int:
        """Over PCIe, for a table in 16 bits: each token's row once, whatever the size of the table."""
        return 2 * self.tokens * self.dim


SMALL = (Case(1, 1, 1), Case(5, 3, 64), Case(33, 272, 80), Case(7, 11, 2500))
LARGE = (Case(4096, 128256, 4096),)
"""Two rows of 2048 tokens of Llama-3-8B."""
