"""Shapes for tests and benchmarks of the look-up in host memory, with what it costs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    dim: int


SMALL = (Case(1, 1, 1), Case(5, 3, 64), Case(33, 272, 80), Case(7, 11, 2500))
LARGE = (Case(4096, 128256, 4096),)
"""Two rows of 2048 tokens of Llama-3-8B."""
