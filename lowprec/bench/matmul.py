"""``lowprec bench matmul``: the products alone, by every backend that can run, for the three products of a layer."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from lowprec_kernels.quantize_rows.reference import FP8
from lowprec_kernels.scaled_matmul.cases import LAYERS, Case, products

from lowprec import ops
from lowprec.bench.measure import BenchResult, need_gpu, peak_tflops
from lowprec.machine.timing import milliseconds
from lowprec.ops.scaled_matmul import BACKENDS


def run(tokens: int = 8192) -> BenchResult:
    """TFLOP/s (TOP/s of int8) at ``tokens`` tokens for the layers of an 8B Llama."""
    need_gpu("matmul")
    rows = []
    for out_features, in_features in LAYERS:
        for name, case in products(tokens, out_features, in_features).items():
            label = {"layer": f"{out_features} x {in_features}", "product": name}
            rows += [label | {"m, n, k": f"{case.m}, {case.n}, {case.k}"} | rate for rate in _rates(case)]
    note = "bound: share of the datasheet's rate, of 16-bit products for bf16 and of 8-bit ones for the others"
    return BenchResult(f"Products alone at {tokens} tokens", rows, [note])


def _rates(case: Case) -> Iterator[dict]:
    a = torch.randn(case.m, case.k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(case.n, case.k, device="cuda", dtype=torch.bfloat16)
    yield _rate(case, "bf16", "PyTorch", lambda: a @ b.t())
    for dtype, kind in ((FP8, "fp8"), (torch.int8, "int8")):
        operands = (*ops.quantize_rows(a, 1, dtype), *ops.quantize_rows(b, 1, dtype))
        for fast in (True, False) if dtype == FP8 else (True,):
            arguments = (*operands, None, torch.bfloat16, fast)
            for backend in BACKENDS[:-1]:
                if backend.why_not(*arguments) is None and (fast or backend.name == "torch._scaled_mm"):
                    sums = "" if dtype == torch.int8 else ", fast sums" if fast else ", fp32 sums"
                    yield _rate(case, kind, f"{backend.name}{sums}", partial(backend.run, *arguments))


def _rate(case: Case, kind: str, kernel: str, call: Callable[[], object]) -> dict:
    ms = milliseconds(call)
    rate = case.flops / ms / 1e9
    return {"operands": kind, "kernel": kernel, "ms": ms, "TFLOP/s": rate, "bound": rate / peak_tflops(kind != "bf16")}
