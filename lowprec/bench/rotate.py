"""``lowprec bench rotate``: the one-pass casts, and NF4 to the operands of products, against the copy of as many bytes,
measured in the same run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lowprec_kernels.hadamard.reference import LARGEST_BLOCK
from lowprec_kernels.nf4.cases import LAYERS
from lowprec_kernels.nf4.cases import Case as Nf4Case
from lowprec_kernels.quantize_rows.cases import LARGE_DIMS, LARGE_ELEMENTS, Case
from lowprec_kernels.quantize_rows.reference import FP8

from lowprec import ops
from lowprec.bench.measure import BenchResult, need_gpu
from lowprec.layers.nf4 import NF4, PRODUCTS
from lowprec.layers.products import GRADIENT_BLOCK, WIDE_BLOCK
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
    rows += [row for out_features, in_features in LAYERS for row in _decoding(out_features, in_features)]
    return BenchResult(
        "Rotate-and-quantise passes, and 4-bit weights to operands",
        rows,
        ["share: of the bandwidth of a copy that moves the same bytes in the same run; bytes read and written counted"],
    )


def _decoding(out_features: int, in_features: int) -> list[dict]:
    """NF4 to each operand of a layer's products, and bitsandbytes' own decoding."""
    import bitsandbytes as bnb

    case = Nf4Case(out_features, in_features)
    rows = []
    for product in PRODUCTS:
        with torch.device("cuda"):
            plain = torch.nn.Linear(in_features, out_features, bias=False).bfloat16()
        layer: Any = NF4(product=product).convert(plain, frozen=True)
        size, plan = (out_features, in_features), layer.plan
        if plan is None:
            out = torch.empty(size, dtype=torch.bfloat16, device="cuda")
            state = layer.weight.quant_state
            calls = {
                "nf4 to bf16": partial(ops.decode_nf4, *layer.stored, out_features, out),
                "nf4 to bf16, bitsandbytes": partial(bnb.functional.dequantize_4bit, layer.weight.data, state),
            }
        else:
            row, column = (bits.view(torch.float32) for bits in (layer.row_bits, layer.column_bits))
            out, turned = (torch.empty(s, dtype=plan.dtype, device="cuda") for s in (size, size[::-1]))
            weight, block = (*layer.stored, out_features), plan.error_out_block
            calls = {
                f"nf4 to {product}": partial(ops.decode_nf4, *weight, out, row, plan.in_block),
                f"nf4 to {product}, transposed": partial(ops.decode_nf4, *weight, turned, column, 1, block, True),
            }
        rows += [
            _row(name, call, out_features, in_features, case.floor_bytes(out.itemsize)) for name, call in calls.items()
        ]
    return rows


def _row(name: str, call: Callable[[], object], rows: int, dim: int, nbytes: float) -> dict:
    ms, copy = milliseconds(call), copy_bandwidth(int(nbytes))
    rate = nbytes / ms / 1e6
    return {"pass": name, "rows": rows, "dim": dim, "ms": ms, "GB/s": rate, "share": rate / copy}


def _passes(x: torch.Tensor, case: Case) -> list[dict]:
    codes = ops.quantize_rows(x, 1, FP8, True)[0]
    factor = torch.ones(case.rows, device=x.device)
    passes = {
        f"rows, int8, block {case.block}": (lambda: ops.quantize_rows(x, case.block, torch.int8), case.row_bytes),
        f"rows, fp8, block {case.block}": (lambda: ops.quantize_rows(x, case.block, FP8), case.row_bytes),
        "rows, fp8, no rotation": (lambda: ops.quantize_rows(x, 1, FP8), case.row_bytes),
        f"rows, int8, block {WIDE_BLOCK}": (lambda: ops.quantize_rows(x, WIDE_BLOCK, torch.int8), case.row_bytes),
        f"columns, int8, block {GRADIENT_BLOCK}": (
            lambda: ops.quantize_columns(x, GRADIENT_BLOCK, torch.int8),
            case.column_bytes,
        ),
        "transpose codes, factors": (lambda: ops.transpose_codes(codes, factor), case.transpose_bytes),
        f"rotate, bf16, block {case.block}": (lambda: ops.rotate(x, case.block), 4 * x.numel()),
    }
    return [_row(name, call, case.rows, case.dim, nbytes) for name, (call, nbytes) in passes.items()]
