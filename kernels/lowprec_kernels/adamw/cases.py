"""Shapes and formats for tests and benchmarks of the AdamW update, and the bytes that it must move."""

import torch
from torch import Tensor

from lowprec_kernels.adamw.reference import BLOCK, SCALE_OF

NUMELS = (1, 255, 256, 257, 1024, 5000, 65537)
WEIGHTS = ((torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "split"), (torch.bfloat16, "fp32"))
MOMENTS = ("fp32", "bf16", "int8")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_states(
    numel: int,
    weight_dtype: torch.dtype,
    master: str,
    moments: str,
    amsgrad: bool,
    device: str,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A random ``(param, grad, states)`` as in the middle of a training run; gradients span six decades."""

    def normal() -> Tensor:
        return torch.randn(numel, generator=generator)

    param = (normal() * 0.05).to(weight_dtype)
    grad = (normal() * torch.pow(10.0, torch.rand(numel, generator=generator) * 6 - 8)).to(weight_dtype)
    states: dict[str, Tensor] = {}
    if master == "split":
        states["residual"] = torch.randint(-(2**15), 2**15, (numel,), generator=generator).to(torch.int16)
    elif master == "fp32":
        states["master"] = param.float() * (1 + normal() * 1e-4)
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    for name in names:
        if moments == "int8":
            low, dtype = (-127, torch.int8) if name == "exp_avg" else (0, torch.uint8)
            high = 128 if name == "exp_avg" else 256
            states[name] = torch.randint(low, high, (numel,), generator=generator).to(dtype)
            blocks = -(-numel // BLOCK)
            states[SCALE_OF[name]] = torch.rand(blocks, generator=generator) * (1e-3 if name == "exp_avg" else 1e-6)
        else:
            value = normal() * grad.float().abs()
            states[name] = (value if name == "exp_avg" else value.square()).to(_DTYPES[moments])
    return param.to(device), grad.to(device), {name: tensor.to(device) for name, tensor in states.items()}


def bytes_moved(param: Tensor, grad: Tensor, states: dict[str, Tensor]) -> int:
    """Bytes that an update reads and writes at least: the gradient once, everything else twice."""
    return grad.nbytes + 2 * (param.nbytes + sum(tensor.nbytes for tensor in states.values()))
