"""AdamW's update of bf16 weights by the kernel, in three formats of states, and PyTorch's fused one of fp32 weights.
And an optimizer's whole step over the parameters of a small model, whose launches may take the host longer."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lowprec_kernels.adamw.cases import bytes_moved

from lowprec.bench.step.call import Call
from lowprec.bench.train.works import SMOL_135M
from lowprec.optim import AdamW
from lowprec.optim.format import StateFormat

CASES = ((2**28,), (2**24,))
"""Elements."""
STEP_CASES = ((SMOL_135M,),)
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


def step_calls(shape: dict[str, Any], device: torch.device) -> Iterator[Call]:
    """``step`` of lowprec's optimizer and of PyTorch's, with what the host takes for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        numels = [p.numel() for p in AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).parameters()]
    told = f"{sum(numels) / 1e6:.1f} M elements in {len(numels)} parameters"

    def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
        made = []
        for numel in numels:
            weight, grad = _weights(numel, dtype, device)
            made.append(torch.nn.Parameter(weight))
            made[-1].grad = grad
        return made

    for moments, master in FORMATS:
        format = StateFormat(torch.bfloat16, moments, master, amsgrad=False)
        ours = AdamW(parameters(torch.bfloat16), lr=1e-5, state_dtype=moments, master=master)
        nbytes = sum(3 * 2 * numel + 2 * format.nbytes(numel) for numel in numels)
        yield Call(told, f"step, {moments} states, master {master}", ours.step, nbytes, replayed=False)
        ours.close()
    for dtype in (torch.bfloat16, torch.float32):
        theirs = torch.optim.AdamW(parameters(dtype), lr=1e-5, fused=True)
        name = str(dtype).removeprefix("torch.")
        yield Call(
            told, f"step, PyTorch fused, {name} weights and states", theirs.step,
            sum(7 * dtype.itemsize * numel for numel in numels), replayed=False,
        )  # fmt: skip


def _weights(numel: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter and its gradient."""
    param, grad = (torch.randn(numel, dtype=dtype, device=device).mul_(scale) for scale in (0.05, 1e-3))
    return param, grad
