"""``lowprec bench matmul``: the products alone, by every backend that can run, for the three products of a layer."""

from functools import partial

import torch
from lowprec_kernels.quantize_rows.reference import FP8
from lowprec_kernels.scaled_matmul.cases import LAYERS, Case, products

from lowprec import ops
from lowprec.bench.measure import BenchResult, need_gpu
from lowprec.machine.timing import milliseconds
from lowprec.ops.scaled_matmul import BACKENDS


def run(tokens: int = 8192) -> BenchResult:
    """TFLOP/s (TOP/s of int8) at ``tokens`` tokens for the layers of an 8B Llama."""
    need_gpu("matmul")
    rows = []
    for out_features, in_features in LAYERS:
        for name, case in products(tokens, out_features, in_features).items():
            label = {"layer": f"{out_features} x {in_features}", "product": name}
            rows.append(label | {"m, n, k": f"{case.m}, {case.n}, {case.k}"} | _rates(case))
    return BenchResult(f"Products alone at {tokens} tokens, TFLOP/s", rows)


def _rates(case: Case) -> dict[str, float]:
    a = torch.randn(case.m, case.k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(case.n, case.k, device="cuda", dtype=torch.bfloat16)
    rates = {"bf16": case.flops / milliseconds(lambda: a @ b.t()) / 1e9}
    for dtype, kind in ((FP8, "fp8"), (torch.int8, "int8")):
        operands = (*ops.quantize_rows(a, 1, dtype), *ops.quantize_rows(b, 1, dtype))
        for fast in (True, False) if dtype == FP8 else (True,):
            arguments = (*operands, None, torch.bfloat16, fast)
            for backend in BACKENDS[:-1]:
                if backend.why_not(*arguments) is None and (fast or backend.name == "torch._scaled_mm"):
                    mark = "" if dtype == torch.int8 else ", fast" if fast else ", fp32 sums"
                    ms = milliseconds(partial(backend.run, *arguments))
                    rates[f"{kind} {backend.name}{mark}"] = case.flops / ms / 1e9
    return rates
