"""AdamW's update of bf16 weights by the kernel, in three formats of states, and PyTorch's fused one of fp32 weights."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lowprec_kernels.adamw.cases import bytes_moved

from lowprec.bench.step.call import Call
from lowprec.optim.format import StateFormat

CASES = ((2**28,), (2**24,))
"""Elements."""
FORMATS = (("fp32", "split"), ("int8", "split"), ("int8", "none"))
"""Moments and master; without one, weights are rounded at random."""
HYPER: dict[str, Any] = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "maximize": False}
STEP = 1000.0


def calls(numel: int, device: torch.device) -> Iterator[Call]:
    from lowprec_kernels.adamw import triton_kernel

    shape = f"{numel / 1e6:.1f} M elements"
    step = torch.tensor(STEP, device=device)
    first, second = torch.tensor([1 - 0.9**STEP, (1 - 0.999**STEP) ** 0.5], device=device).unbind()
    for moments, master in FORMATS:
        param, grad = _weights(numel, torch.bfloat16, device)
        states = {
            field.name: torch.zeros(-(-numel // field.block), dtype=field.dtype, device=device)
            for field in StateFormat(torch.bfloat16, moments, master, amsgrad=False).fields
        }
        update = partial(
            triton_kernel.run, param, grad, states,
            step=step, corrections=(first, second), start=0, key=1, found_inf=None, **HYPER,
        )  # fmt: skip
        yield Call(shape, f"{moments} states, master {master}", update, bytes_moved(param, grad, states))
    param, grad = _weights(numel, torch.float32, device)
    m, v = torch.zeros_like(param), torch.zeros_like(param)
    fused = partial(
        torch._fused_adamw_, [param], [grad], [m], [v], [], [step],
        amsgrad=False, grad_scale=None, found_inf=None, **HYPER,
    )  # fmt: skip
    yield Call(shape, "PyTorch, fp32 weights and states", fused, bytes_moved(param, grad, {"m": m, "v": v}))


def _weights(numel: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter and its gradient."""
    param, grad = (torch.randn(numel, dtype=dtype, device=device).mul_(scale) for scale in (0.05, 1e-3))
    return param, grad
