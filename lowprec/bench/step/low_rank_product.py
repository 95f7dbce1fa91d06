"""The 8-bit product of a linear layer with the second product of its LoRA term: after it, and in its epilogue."""

from collections.abc import Iterator
from functools import partial

import torch
from lowprec_kernels.quantize_rows.reference import FP8
from lowprec_kernels.scaled_matmul.reference import add_low_rank

from lowprec import ops
from lowprec.bench.step.call import Call
from lowprec.ops.backends import choose
from lowprec.ops.scaled_matmul import BACKENDS

KINDS = {"e4m3": FP8, "int8": torch.int8}
CASES = ((4096, 14336, 4096, "e4m3"), (4096, 14336, 4096, "int8"))
"""Tokens, features out and in, operands."""
RANKS = (16, 64)


def calls(tokens: int, out_features: int, in_features: int, kind: str, device: torch.device) -> Iterator[Call | str]:
    x, weight = (torch.randn(rows, in_features, dtype=torch.bfloat16, device=device) for rows in (tokens, out_features))
    operands = (*ops.quantize_rows(x, 1, KINDS[kind]), *ops.quantize_rows(weight, 1, KINDS[kind]))
    args = (*operands, None, torch.bfloat16, True)
    # The backend itself: the op would take ranks above FUSED_RANK out of the kernel.
    backend = choose(BACKENDS, *args)
    shape = f"{tokens} tokens, {out_features} x {in_features}, {kind}"
    flops = 2 * tokens * out_features * in_features
    yield Call(shape, f"alone ({backend.name})", partial(backend.run, *args), flops=flops)
    for rank in RANKS:
        low, up = (torch.randn(rows, rank, dtype=torch.bfloat16, device=device) for rows in (tokens, out_features))
        total = flops + 2 * tokens * out_features * rank

        def added(low: torch.Tensor = low, up: torch.Tensor = up) -> torch.Tensor:
            return add_low_rank(backend.run(*args), low, up)

        yield Call(shape, f"rank {rank} by addmm_ after it", added, flops=total)
        if backend.name == "torch._scaled_mm":
            yield f"{shape}: {backend.name} adds no term in its kernel"
        else:
            yield Call(shape, f"rank {rank} in its kernel", partial(backend.run, *args, low, up), flops=total)
