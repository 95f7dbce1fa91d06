"""Shapes for tests and benchmarks of the scaled product, with what they cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def nbytes(self) -> int:
        """8-bit operands read once, a 16-bit result written once."""
        return self.k * (self.m + self.n) + 2 * self.m * self.n


SMALL = (Case(1, 16, 16), Case(5, 48, 32), Case(64, 64, 128), Case(130, 80, 272))
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336))
"""(out, in) of Llama-3-8B's linear layers."""


def products(tokens: int, out_features: int, in_features: int) -> dict[str, Case]:
    """The three products of a layer."""
    return {
        "forward": Case(tokens, out_features, in_features),
        "input gradient": Case(tokens, in_features, out_features),
        "weight gradient": Case(out_features, in_features, tokens),
    }
