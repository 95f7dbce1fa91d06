"""Whether Liger's Triton kernels can run, and the call that decides it for a tensor."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from lowprec.ops.backends import no_triton


def why_no_liger(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, in words for the report; None where they can."""
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed: pip install 'lowprec[cuda]'"
    if device.type != "cuda":
        return f"Liger's kernels run on CUDA devices, the model is on {device.type}"
    return no_triton(device)


@cache
def liger_version() -> str:
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return "?"


@cache
def interpreted() -> bool:
    """Whether Triton runs its kernels as Python, on any device: tests do that."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def runs_on(x: torch.Tensor) -> bool:
    """Whether a kernel may be given this tensor: a model can be moved after its surgery."""
    return x.is_cuda or interpreted()
