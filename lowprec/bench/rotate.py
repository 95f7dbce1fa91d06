"""``lowprec bench rotate``: the one-pass casts against the copy of as many bytes, measured in the same run."""

import torch
from lowprec_kernels.hadamard.reference import LARGEST_BLOCK
from lowprec_kernels.quantize_rows.cases import LARGE_DIMS, LARGE_ELEMENTS, Case
from lowprec_kernels.quantize_rows.reference import FP8

from lowprec import ops
from lowprec.bench.measure import BenchResult, need_gpu
from lowprec.layers.products import GRADIENT_BLOCK
from lowprec.machine.timing import copy_bandwidth, milliseconds


def run(tokens: int = 8192) -> BenchResult:
    """Casts of at least 128 Mi elements, and of ``tokens`` rows, for rows of 1536 to 14336."""
    need_gpu("rotate")
    big = torch.randn(LARGE_ELEMENTS + max(LARGE_DIMS), dtype=torch.bfloat16, device="cuda")
    rows = []
    for dim in LARGE_DIMS:
        for count in (-(-LARGE_ELEMENTS // dim), tokens):
            x = big[: count * dim].view(count, dim)
            rows += _passes(x, Case(count, dim, LARGEST_BLOCK))
    return BenchResult(
        "Rotate-and-quantise passes",
        rows,
        ["share: of the bandwidth of a copy that moves the same bytes in the same run; bytes read and written counted"],
    )


def _passes(x: torch.Tensor, case: Case) -> list[dict]:
    codes = ops.quantize_rows(x, 1, FP8, True)[0]
    factor = torch.ones(case.rows, device=x.device)
    passes = {
        f"rows, int8, block {case.block}": (lambda: ops.quantize_rows(x, case.block, torch.int8), case.row_bytes),
        f"rows, fp8, block {case.block}": (lambda: ops.quantize_rows(x, case.block, FP8), case.row_bytes),
        "rows, fp8, no rotation": (lambda: ops.quantize_rows(x, 1, FP8), case.row_bytes),
        f"columns, int8, block {GRADIENT_BLOCK}": (
            lambda: ops.quantize_columns(x, GRADIENT_BLOCK, torch.int8),
            case.column_bytes,
        ),
        "transpose codes, factors": (lambda: ops.transpose_codes(codes, factor), case.transpose_bytes),
        f"rotate, bf16, block {case.block}": (lambda: ops.rotate(x, case.block), 4 * x.numel()),
    }
    rows = []
    for name, (call, nbytes) in passes.items():
        ms, copy = milliseconds(call), copy_bandwidth(nbytes)
        rate = nbytes / ms / 1e6
        rows.append({"pass": name, "rows": case.rows, "dim": case.dim, "ms": ms, "GB/s": rate, "share": rate / copy})
    return rows
