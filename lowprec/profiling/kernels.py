"""The kernels of one step (operators, on a processor): which take longest, what share goes into casts and rotations,
and the whole step as a trace for ui.perfetto.dev or chrome://tracing."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

_CLASSES = (
    ("rotations", r"rotate|rotated|hadamard|lowprec::rotate"),
    ("casts", r"quantize|quantise|transpose_codes|_column_amax|_decode(_rows|_columns)?\b|_to_copy|aten::copy_"
              r"|copy_kernel.*(load|store)withcast|(bfloat16|float16|float8\w*)_copy_kernel"),
    ("attention", r"flash|fmha|attention|attn"),
    ("products", r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitk|_persistent|_simple|scaled_mm|scaled_matmul"
                 r"|aten::(add|baddb|b)?mm_?\b|aten::linear|_int_mm"),
    ("optimizer", r"adam|multi_tensor|optimizer|gradient_norm"),
    ("loss", r"cross_entropy|log_softmax|nll_loss|softmax"),
    ("memory moves", r"memcpy|memset|copy_kernel|fillfunctor|aten::(zero_|fill_)"),
)  # fmt: skip
"""Class -> names of kernels (CUDA) or operators, lower case; the first that matches. A kernel that rotates and casts in
one pass (``quantize_rows``) counts as a cast. On a processor every copy does: ``aten::copy_`` does not tell."""


@dataclass(kw_only=True)
class Kernels:
    """Times of one step, ms, each of its own without what it calls."""

    on_device: bool
    total_ms: float
    top: list[dict[str, Any]] = field(default_factory=list)
    """``name``, ``class``, ``ms``, ``share``, ``calls``; the longest first."""
    shares: dict[str, float] = field(default_factory=dict)
    """Class -> share of ``total_ms``."""

    def to_dict(self) -> dict[str, Any]:
        casts, rotations = self.shares.get("casts", 0.0), self.shares.get("rotations", 0.0)
        return {
            "measured_on": "device" if self.on_device else "processor",
            "total_ms": self.total_ms,
            "casts_and_rotations": casts + rotations,
            "shares": self.shares,
            "top": self.top,
        }


@contextmanager
def traced(device: torch.device, trace: Path | None, most: int = 15) -> Iterator[Kernels]:
    """Watch the work called inside. The yielded object is filled when it ends.

    Args:
        trace: where the step's trace goes (``.json.gz``); None writes none.
        most: kernels in ``top``.
    """
    kernels = Kernels(on_device=device.type == "cuda", total_ms=0.0)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else PyTorch writes to the terminal when it starts and stops
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if kernels.on_device else [])
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:  # without it, it warns
        yield kernels
        if kernels.on_device:
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    _fill(kernels, profiler.key_averages(), most)


def kernel_class(name: str) -> str:
    """The class of a kernel or operator by its name; ``other`` where none fits."""
    lower = name.lower()
    return next((kind for kind, pattern in _CLASSES if re.search(pattern, lower)), "other")


def _fill(kernels: Kernels, averages: Any, most: int) -> None:
    wanted = DeviceType.CUDA if kernels.on_device else DeviceType.CPU
    times = []
    for event in averages:
        microseconds = event.self_device_time_total if kernels.on_device else event.self_cpu_time_total
        if (
            event.device_type == wanted
            and microseconds > 0
            and not event.key.startswith(("ProfilerStep", "Optimizer."))
        ):
            times.append((event.key, microseconds / 1000, event.count))
    times.sort(key=lambda entry: -entry[1])
    kernels.total_ms = round(sum(ms for _, ms, _ in times), 3)
    total = kernels.total_ms or 1.0
    shares: dict[str, float] = {}
    for name, ms, _ in times:
        shares[kernel_class(name)] = shares.get(kernel_class(name), 0.0) + ms / total
    kernels.shares = dict(sorted(shares.items(), key=lambda share: -share[1]))
    kernels.top = [
        {"name": _short(name), "class": kernel_class(name), "ms": round(ms, 3), "share": ms / total, "calls": calls}
        for name, ms, calls in times[:most]
    ]


def _short(name: str) -> str:
    """Without the template arguments that fill pages."""
    name = re.sub(r"^void ", "", name)
    return name if len(name) <= 110 else f"{name[:107]}..."
