"""Shapes for tests and benchmarks of decoding NF4, with what they cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    rows: int
    dim: int
    block_size: int = 64
    double_quant: bool = True

    @property
    def stored_bytes(self) -> float:
        """Half a byte a weight, and the scales."""
        blocks = self.rows * self.dim / self.block_size
        return self.rows * self.dim / 2 + (blocks * (1 + 4 / 256) if self.double_quant else 4 * blocks)

    def floor_bytes(self, itemsize: int) -> float:
        """What has to be moved to decode into elements of ``itemsize`` bytes: read once, written once."""
        return self.stored_bytes + itemsize * self.rows * self.dim


SMALL = (
    Case(1, 16),
    Case(3, 64, double_quant=False),
    Case(33, 192),
    Case(70, 576, 128),  # a row is not a whole number of blocks
    Case(48, 80, 4096),  # a block spans many rows
    Case(96, 336, 256, double_quant=False),
    Case(300, 256),  # several coarse scales
)
LAYERS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
"""(out, in) of Llama-3-8B's linear layers."""
