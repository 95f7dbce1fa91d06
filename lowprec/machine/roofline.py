"""The time that a product cannot beat by much: arithmetic in whole tiles and whole waves, or traffic, and a start.

A GPU gives each tile of the result to one multiprocessor, and a wave of ``sm_count`` tiles takes as long as one tile,
so that ceil(m / BM) ceil(n / BN) tiles take ceil(tiles / sm_count) waves. Libraries choose the tile; so does this, by
the least time.
"""

from math import ceil
from typing import NamedTuple

TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 128, 0.8), (64, 64, 0.65))
"""Rows, columns, share of the full rate. A small tile reads more operand bytes an operation from shared memory; the
shares are assumptions, which a measured machine's correction takes over."""
ITEM_BYTES = {"bf16": (2, 2), "fp16": (2, 2), "tf32": (4, 4), "fp32": (4, 4), "fp8": (1, 2), "int8": (1, 2)}
"""Kind -> bytes of an operand's and of the result's element."""


class Rates(NamedTuple):
    """What bounds one kind of product."""

    tflops: float
    gb_per_s: float
    sm_count: int
    """0 for a processor, whose products come in no tiles worth counting."""
    product_us: float
    """The least time of a product."""


def bound_ms(kind: str, m: int, n: int, k: int, rates: Rates) -> float:
    """ms of ``[m, k] @ [k, n]``."""
    arithmetic = arithmetic_ms(m, n, k, rates.tflops) / efficiency(m, n, rates.sm_count)
    return rates.product_us / 1e3 + max(arithmetic, product_bytes(kind, m, n, k) / rates.gb_per_s / 1e6)


def arithmetic_ms(m: int, n: int, k: int, tflops: float) -> float:
    """ms at the full rate."""
    return 2.0 * m * n * k / tflops / 1e9


def product_bytes(kind: str, m: int, n: int, k: int) -> int:
    """Operands read once, the result written once."""
    operand, result = ITEM_BYTES[kind]
    return operand * k * (m + n) + result * m * n


def efficiency(m: int, n: int, sm_count: int) -> float:
    """The largest share of the full rate that whole tiles in whole waves leave, over the known tiles."""
    if sm_count == 0:
        return 1.0
    return max(share * m * n / (waves(m, n, bm, bn, sm_count) * sm_count * bm * bn) for bm, bn, share in TILES)


def waves(m: int, n: int, bm: int, bn: int, sm_count: int) -> int:
    return ceil(ceil(m / bm) * ceil(n / bn) / sm_count)
