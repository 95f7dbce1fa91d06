"""Shapes for tests and benchmarks of the casts, with what they cost."""

from dataclasses import dataclass

import torch

from lowprec_kernels.quantize_rows.reference import FP8


@dataclass(frozen=True)
class Case:
    rows: int
    dim: int
    block: int
    """Along the rows' elements for ``quantize_rows``, along the columns' for ``quantize_columns``."""

    @property
    def row_bytes(self) -> int:
        """bf16 read once, codes written once, and the scales."""
        return 3 * self.rows * self.dim + 4 * self.rows

    @property
    def column_bytes(self) -> int:
        """bf16 read twice, since a column's scale needs all its rows."""
        return 5 * self.rows * self.dim + 4 * self.dim

    @property
    def transpose_bytes(self) -> int:
        return 2 * self.rows * self.dim


SMALL = (
    Case(1, 16, 1),
    Case(3, 64, 64),
    Case(33, 192, 64),
    Case(70, 576, 64),
    Case(40, 80, 16),
    Case(17, 336, 1),
    Case(9, 768, 256),
)
LARGE_DIMS = (1536, 2048, 4096, 8192, 14336)
LARGE_ELEMENTS = 128 * 2**20
NOISE_FLOOR_DB = {FP8: 31.0, torch.int8: 39.0}
"""Of codes of normal numbers, rows of up to 1024."""
