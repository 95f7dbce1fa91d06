"""The product of a gated MLP as e4m3 codes, and its gradients as such: by one kernel, and by Liger's with the casts
after it."""

from collections.abc import Iterator

import torch
from lowprec_kernels.gated_rows.cases import LARGE, Case
from lowprec_kernels.quantize_rows.reference import FP8

from lowprec import ops
from lowprec.bench.step.call import Call, liger_functions

CASES = tuple((case.rows, case.dim, kind) for kind in ("SwiGLU", "GeGLU") for case in LARGE)
"""Tokens and inner width of MLPs of Llama-3.2-1B and Llama-3-8B, and the kind of product."""


def calls(tokens: int, inner: int, kind: str, device: torch.device) -> Iterator[Call]:
    liger_functions()  # says what to install
    from liger_kernel.ops import geglu, swiglu

    forward, backward = {
        "SwiGLU": (swiglu.swiglu_forward, swiglu.swiglu_backward),
        "GeGLU": (geglu.geglu_forward, geglu.geglu_backward),
    }[kind]
    error, gate, up = (torch.randn(tokens, inner, device=device, dtype=torch.bfloat16) for _ in range(3))
    overwritten = gate.clone(), up.clone()  # by Liger's backward: other numbers each time, in the same time
    partner = torch.rand(tokens, device=device) + 0.5

    def apart() -> object:
        return ops.quantize_rows(forward(gate, up)[-1], 1, FP8)

    def gradients_apart() -> object:
        return [ops.quantize_rows(gradient, 1, FP8, True, partner) for gradient in backward(*overwritten, error)]

    shape, case = f"{tokens} x {inner}, {kind}", Case(tokens, inner)
    nbytes = case.forward_bytes
    yield Call(f"{shape}, forward", "lowprec", lambda: ops.quantize_gated(gate, up, kind), nbytes)
    yield Call(f"{shape}, forward", "Liger, then the cast", apart, nbytes)
    nbytes = case.backward_bytes
    together = ops.quantize_gated_gradients
    yield Call(f"{shape}, backward", "lowprec", lambda: together(error, gate, up, kind, partner), nbytes)
    yield Call(f"{shape}, backward", "Liger, then the casts", gradients_apart, nbytes)
