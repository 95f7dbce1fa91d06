"""How an op finds the kernel that runs: an ordered tuple of backends, each of which can say why it cannot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute an op. ``why_not`` and ``run`` take the op's own arguments."""

    name: str
    run: Callable
    why_not: Callable[..., str | None] = lambda *args: None
    """None where it can run; else the reason, as tests print it when they skip and ``doctor`` in its table."""


def choose(backends: Sequence[Backend], *args: object) -> Backend:
    """The first backend that can run. The last one, the reference, always can."""
    return next(backend for backend in backends if backend.why_not(*args) is None)


def lazily(module: str, function: str) -> Callable:
    """``lowprec_kernels.<module>.<function>``, imported at the first call."""

    def run(*args: object) -> object:
        return getattr(import_module(f"lowprec_kernels.{module}"), function)(*args)

    return run


def no_triton(device: torch.device, codes: torch.dtype | None = None) -> str | None:
    """Why Triton's kernels cannot run on ``device`` with codes of that dtype."""
    if device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, the tensor is on {device.type}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    capability = _capability(device.index or 0)
    if capability < (8, 0):
        return f"compute capability {_dotted(capability)} is below 8.0"
    if codes == FP8 and capability < (8, 9):
        return f"fp8 needs compute capability 8.9 or newer, this GPU has {_dotted(capability)}"
    return None


def no_hopper(device: torch.device) -> str | None:
    """Why the kernels that use the bulk copy engine cannot run on ``device``."""
    reason = no_triton(device)
    if reason is None and _capability(device.index or 0) < (9, 0):
        reason = "the bulk copy engine needs compute capability 9.0 or newer"
    return reason


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
