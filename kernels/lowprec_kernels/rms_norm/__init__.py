"""``rms_norm_backward(grad, x, weight, rstd, offset, weight_grad)``: the gradients of an RMSNorm; see the reference."""

LONGEST_ROW = 16384
PARTIAL_SUMS = 8192
"""Numbers of the weight's gradient that a multiprocessor leaves to be added up, at most."""


def row_block(dim: int) -> int:
    """The power of two that holds a row."""
    return 1 << (dim - 1).bit_length()


def num_programs(rows: int, dim: int, cores: int) -> int:
    """Programs that share the rows where the weight's gradient is wanted: each leaves a partial sum, fp32 ``[dim]``."""
    return min(rows, cores * max(1, PARTIAL_SUMS // max(row_block(dim), 2048)))
