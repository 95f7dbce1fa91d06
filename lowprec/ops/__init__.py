"""Custom operators of ``torch.library``: each file has the op, its fake (shapes only, for tracing) and its backends.

Importing this package loads no Triton and touches no device; a backend loads its kernel when it first runs.
"""

from lowprec.ops.decode_nf4 import decode_nf4
from lowprec.ops.fold_scales import fold_scales
from lowprec.ops.gather_host_rows import gather_host_rows
from lowprec.ops.quantize_columns import quantize_columns, requantize_columns
from lowprec.ops.quantize_gated import quantize_gated, quantize_gated_gradients
from lowprec.ops.quantize_rows import quantize_rows
from lowprec.ops.rotate import rotate
from lowprec.ops.scaled_grouped_matmul import scaled_grouped_matmul
from lowprec.ops.scaled_matmul import scaled_matmul
from lowprec.ops.transpose_codes import transpose_codes

__all__ = [
    "decode_nf4",
    "fold_scales",
    "gather_host_rows",
    "quantize_columns",
    "quantize_gated",
    "quantize_gated_gradients",
    "quantize_rows",
    "requantize_columns",
    "rotate",
    "scaled_grouped_matmul",
    "scaled_matmul",
    "transpose_codes",
]
