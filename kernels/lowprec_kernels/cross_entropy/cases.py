"""Shapes for tests and benchmarks of the cross-entropy, with what they cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    scale: float = 1.0
    softcap: float = 0.0

    @property
    def bytes(self) -> int:
        """bf16 logits read once and overwritten once; the second read is the cache's."""
        return 4 * self.rows * self.classes


SMALL = (Case(1, 2), Case(3, 272), Case(5, 5000), Case(7, 100, scale=0.25), Case(4, 4097, softcap=30.0))
LARGE = (Case(512, 128256), Case(2048, 128256), Case(1024, 49152), Case(512, 256000, softcap=30.0))
