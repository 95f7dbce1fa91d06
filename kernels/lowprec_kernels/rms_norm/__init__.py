"""``rms_norm_backward(grad, x, weight, rstd, offset, weight_grad)``: the gradients of an RMSNorm; see the reference."""

LONGEST_ROW = 16384
TILE = 2048
"""Elements that a program reads at once: several rows where they are short, and at least one."""
PARTIAL_SUMS = 8192
"""Numbers of the weight's gradient that a multiprocessor leaves to be added up, but for longer rows. H100, bf16: 8192 x
2048 takes 46 us, 51 with 16384 and 56 with 4096; 4096 x 4096 takes 48, 51 and 61."""


def row_block(dim: int) -> int:
    """The power of two that holds a row."""
    return 1 << (dim - 1).bit_length()


def rows_of_tile(dim: int) -> int:
    return max(1, TILE // row_block(dim))


def num_programs(rows: int, dim: int, cores: int) -> int:
    """Programs that share the rows where the weight's gradient is wanted: each leaves a partial sum, fp32 ``[dim]``."""
    return min(-(-rows // rows_of_tile(dim)), cores * max(1, PARTIAL_SUMS // max(row_block(dim), TILE)))
