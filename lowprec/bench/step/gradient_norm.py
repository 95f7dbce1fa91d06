"""The norm of a gradient with the flag of one that is not finite: one launch, and PyTorch's operations."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from lowprec_kernels.gradient_norm import reference
from lowprec_kernels.gradient_norm.cases import LARGE

from lowprec.bench.step.call import Call

CASES = tuple((numel,) for numel in LARGE[-2:])
"""bf16 elements: 16.8 M and 263 M."""


def calls(numel: int, device: torch.device) -> Iterator[Call]:
    from lowprec_kernels.gradient_norm import triton_kernel

    grad = torch.randn(numel, dtype=torch.bfloat16, device=device)
    norm, found_inf = torch.zeros((), device=device), torch.zeros((), device=device)
    ways: dict[str, Callable[..., None]] = {
        "norm and flag in one launch": partial(triton_kernel.norm_, scratch=triton_kernel.make_scratch(device)),
        "vector_norm, then the flag": reference.norm_,
    }
    for way, function in ways.items():
        yield Call(f"{numel / 1e6:.1f} M elements", way, partial(function, grad, norm, found_inf), grad.nbytes)
