"""How ops are defined, and how one finds the kernel that runs: an ordered tuple of backends that can say why they
cannot.

Ops are defined in a ``torch.library.Library`` with a fake for tracing. (``torch.library.custom_op`` says the same in
fewer lines, but costs 70 us a call on the host against 8 here, and a trained layer makes a dozen calls a step.) Where
nobody could notice, a call goes to the implementation directly, for 1 to 3 us.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

FP8 = torch.float8_e4m3fn
_LIBRARY = torch.library.Library("lowprec", "DEF")


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


def define(schema: str, run: Callable, fake: Callable) -> Callable:
    """Register the op ``lowprec::<schema>`` with its implementation and its fake; returns what callers call."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowprec::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.lowprec, name).default

    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs) if _is_watched(args[0]) else run(*args, **kwargs)

    call.__name__ = name
    return call


def _is_watched(tensor: torch.Tensor) -> bool:
    """Whether autograd, a compiler, a mode (tracing, checkpointing, counting) or a tensor's class has to see the op."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
    )


def lazily(module: str, function: str) -> Callable:
    """``lowprec_kernels.<module>.<function>``, imported at the first call."""

    @cache
    def load() -> Callable:
        return getattr(import_module(f"lowprec_kernels.{module}"), function)

    return lambda *args: load()(*args)


@cache
def no_triton(device: torch.device, codes: torch.dtype | None = None) -> str | None:
    """Why Triton's kernels cannot run on ``device`` with codes of that dtype."""
    if device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, the tensor is on {device.type}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {_dotted(capability)} is below 8.0"
    if codes == FP8 and capability < (8, 9):
        return f"fp8 needs compute capability 8.9 or newer, this GPU has {_dotted(capability)}"
    return None


@cache
def no_hopper(device: torch.device) -> str | None:
    """Why the kernels that use the bulk copy engine cannot run on ``device``."""
    reason = no_triton(device)
    if reason is None and torch.cuda.get_device_capability(device) < (9, 0):
        reason = "the bulk copy engine needs compute capability 9.0 or newer"
    return reason


def no_rotation(block: int) -> str | None:
    """Why the kernels cannot rotate in blocks of that order."""
    if block == 1 or 16 <= block <= 256:
        return None
    return f"a block of {block} is outside the 16 to 256 of the tensor cores' product"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
