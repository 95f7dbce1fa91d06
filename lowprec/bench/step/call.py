"""One way to compute a piece of a step, and the row of figures that it gets."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from lowprec.errors import UserError
from lowprec.machine.timing import graph_milliseconds, milliseconds
from lowprec.profiling.kernels import traced


@dataclass(frozen=True, slots=True)
class Call:
    """A way to compute a piece; pieces yield these, and texts that become notes under the table."""

    shape: str
    way: str
    run: Callable[[], object]
    nbytes: int = 0
    """Bytes that have to move: the row then has bandwidths, its own and a copy's, in place of memory."""
    flops: int = 0
    replayed: bool = True
    """Timed as a CUDA graph, whatever the host takes for its launches. False where the host has to read a number."""
    names_kernel: bool = False
    """Whether a library chooses the kernel: the way then tells which."""


def figures(call: Call, device: torch.device) -> dict[str, Any]:
    """``shape``, ``way``, ``ms``, and of ``GiB``, ``TB/s``, ``copy, TB/s`` and ``TFLOP/s`` what makes sense."""
    call.run()  # compiles, and takes what is kept for good
    way = f"{call.way}: {kernel_of(call.run, device)}" if call.names_kernel else call.way
    ms = _ms(call.run, device, call.replayed)
    row: dict[str, Any] = {"shape": call.shape, "way": way, "ms": ms}
    if call.nbytes:
        source = torch.ones(call.nbytes // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        row["TB/s"] = call.nbytes / ms / 1e9
        row["copy, TB/s"] = call.nbytes / _ms(lambda: target.copy_(source), device) / 1e9
    elif device.type == "cuda":
        row["GiB"] = _peak_gib(call.run)
    if call.flops:
        row["TFLOP/s"] = call.flops / ms / 1e9
    return row


def kernel_of(run: Callable[[], object], device: torch.device) -> str:
    """The name of the kernel (operator, on a processor) that takes longest in a call, without namespaces."""
    with traced(device, None, most=1) as kernels:
        run()
    name = kernels.top[0]["name"] if kernels.top else "no kernel seen"
    return re.sub(r"\w+::", "", name)[:60]


def liger_functions() -> Any:
    """The module of Liger's autograd functions.

    Raises:
        UserError: the package is not installed.
    """
    if find_spec("liger_kernel") is None:
        raise UserError('lowprec bench step measures Liger, too: pip install "lowprec[cuda]", or choose with --works.')
    import liger_kernel.ops

    return liger_kernel.ops


def _ms(run: Callable[[], object], device: torch.device, replayed: bool = True) -> float:
    if replayed and device.type == "cuda":
        return graph_milliseconds(run)
    return milliseconds(run, device=device)


def _peak_gib(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
