"""``measure``: this machine's profile in under 90 seconds. Every part has a deadline, so that slow ones end, too."""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import torch

from lowprec.bench import ssd
from lowprec.errors import UserError
from lowprec.machine.context import FreshProcess, fresh_context
from lowprec.machine.correction import Sample, fit, validate
from lowprec.machine.energy import nvml_handle
from lowprec.machine.machine import KINDS, Machine
from lowprec.machine.profile import Profile, processor
from lowprec.machine.roofline import Rates
from lowprec.machine.shapes import Shape, designed_shapes
from lowprec.machine.timing import copy_bandwidth, graph_milliseconds, link_bandwidth, milliseconds
from lowprec.optim.disk import GIB, HostMemory

SECONDS = 24.0
MAX_PRODUCTS = 140
"""Of one kind: more would make the fit no better, and slower."""
MIN_PRODUCTS = 24
ROW = 256
"""Kernels of the row in which the least time of one is measured."""
REPLAYS = 10
"""Of which a product's time is the median, twice."""

Progress = Callable[[str, float], None]
"""What is being measured, and the share that is done."""


def measure(folder: Path, progress: Progress = lambda what, share: None, seconds: float = SECONDS) -> Profile:
    """Measure products, memory, links and the disk under ``folder``.

    Args:
        seconds: for products and disk; CUDA's start, the links and the fit take as long again where a GPU is fast, and
            kernels that are compiled for the first time come to that.

    Raises:
        UserError: the disk has no room for the test file, or a run holds the folder.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    progress("disk", 0.0)
    fresh = FreshProcess(device) if gpu else None  # imports PyTorch meanwhile
    try:
        disk, direct = ssd.quick(folder, seconds / 6, min(1.0, seconds / 30))
        context = fresh_context(device, fresh) if gpu else None
    finally:
        if fresh is not None:
            fresh.close()
    progress("memory and links", 0.15)
    memory = copy_bandwidth(min(2 * GIB if gpu else GIB // 2, _free_bytes(device) // 4), device)
    h2d, d2h = link_bandwidth(GIB // 2, device) if gpu else (memory, memory)
    pinned = pinned_gib() if gpu else None
    refused = {kind: why for kind in KINDS if (why := _why_not(kind, device)) is not None}
    kinds = [kind for kind in KINDS if kind not in refused]
    products, differences = _products(kinds, device, seconds * 5 / 6, progress)
    launch_us = 1e3 * _least_kernel_ms(device)
    product_us = 1e3 * _Operands("fp32", device).milliseconds(Shape(16, 16, 16, ""))
    sm_count = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 0
    rates = {kind: Rates(_tflops(samples), memory, sm_count, product_us) for kind, samples in products.items()}
    progress("fitting", 0.95)
    machine = Machine(
        name=torch.cuda.get_device_name(device) if gpu else processor(),
        measured=True,
        vram_gib=torch.cuda.get_device_properties(device).total_memory / GIB if gpu else 0.0,
        sm_count=sm_count,
        capability=torch.cuda.get_device_capability(device) if gpu else None,
        tflops={kind: rate.tflops for kind, rate in rates.items()},
        memory_gb_per_s=memory,
        h2d_gb_per_s=h2d,
        d2h_gb_per_s=d2h,
        disk_read_gb_per_s=disk.read_gb_s,
        disk_write_gb_per_s=disk.write_gb_s,
        disk_mixed_gb_per_s=disk.mixed_gb_s,
        power_w=_power_w(device) if gpu else None,
        context_mib=context.mib if context else 0.0,
        launch_us=launch_us,
        product_us=product_us,
        assumed=("context_mib",) if context and context.assumed else (),
        corrections={kind: fit(kind, samples, rates[kind]) for kind, samples in products.items()},
    )
    from lowprec.report import versions

    return Profile(
        machine=machine,
        products=products,
        validation={kind: validate(kind, samples, rates[kind]) for kind, samples in products.items()},
        repeat_error=float(np.median(differences)),
        limits={
            "pinned_gib": pinned,
            "disk_path": str(folder.resolve()),
            "disk_direct": direct,
            "disk_block_mib": disk.block_mib,
            "disk_threads": disk.threads,
            "kinds_refused": refused,
        },
        versions=versions() | ({"cuda": str(torch.version.cuda)} if gpu else {}),
        written=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _products(
    kinds: list[str], device: torch.device, seconds: float, progress: Progress
) -> tuple[dict[str, list[Sample]], list[float]]:
    """Timed products of each kind, and how much the second time of each differs from the first.

    All products of a kind are timed twice, a while apart, and the lesser time counts: other work only ever adds.
    """
    end, differences = time.perf_counter() + seconds, []
    products: dict[str, list[Sample]] = {}
    for index, kind in enumerate(kinds):
        share = (end - time.perf_counter()) / (len(kinds) - index)
        halfway = time.perf_counter() + share / 2
        operands = _Operands(kind, device)
        limit = 2 * 1024**3 / operands.milliseconds(Shape(1024, 1024, 1024, "")) * (15 if device.type == "cuda" else 60)
        shapes = designed_shapes(limit, operands.elements, 16 if kind in ("fp8", "int8") else 4)[:MAX_PRODUCTS]
        first: list[float] = []
        for shape in shapes:
            progress(f"products in {kind}", 0.25 + 0.7 * (index + len(first) / len(shapes) / 2) / len(kinds))
            first.append(operands.milliseconds(shape))
            if time.perf_counter() > halfway and len(first) >= MIN_PRODUCTS:
                break
        samples = products.setdefault(kind, [])
        for shape, earlier in zip(shapes, first, strict=False):
            progress(f"products in {kind}", 0.25 + 0.7 * (index + 0.5 + len(samples) / len(first) / 2) / len(kinds))
            again = operands.milliseconds(shape)
            differences.append(abs(again / earlier - 1))
            samples.append(Sample(shape.m, shape.n, shape.k, min(earlier, again), shape.group))
    return products, differences


class _Operands:
    """One random buffer a kind, of which every product takes views: making operands would take longer than products."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.kind, self.device = kind, device
        # Whole kibibytes: operands are cut from the end as well, and kernels want them aligned.
        self.elements = min(2**28 if device.type == "cuda" else 2**25, _free_bytes(device) // 32) // 1024 * 1024
        numbers = torch.randn(self.elements, device=device)
        self._scale = torch.ones(1, device=device)
        if kind == "int8":
            self._buffer = (numbers * 40).clamp(-127, 127).to(torch.int8)
        else:
            dtypes = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}
            self._buffer = numbers.to(dtypes.get(kind, torch.float32))

    def milliseconds(self, shape: Shape) -> float:
        a = self._buffer[: shape.m * shape.k].view(shape.m, shape.k)
        b = self._buffer[-shape.n * shape.k :].view(shape.n, shape.k)
        if self.kind not in ("fp8", "int8"):
            return self._time(lambda: a @ b.t())
        from lowprec.ops import scaled_matmul

        return self._time(lambda: scaled_matmul(a, self._scale, b, self._scale, None, torch.bfloat16, True))

    def _time(self, run: Callable[[], object]) -> float:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.kind == "tf32"
        try:
            if self.device.type == "cuda":  # replayed: the host takes longer for a small 8-bit product than the device
                return graph_milliseconds(run, repeats=REPLAYS)
            return milliseconds(run, repeat_ms=15, device=self.device, warmup_ms=5)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def _why_not(kind: str, device: torch.device) -> str | None:
    """Why a kind is left out, or None: by capability, and by a product on the GPU.

    A processor's bf16 counts where it multiplies it itself; its 8-bit products are emulated, so nobody plans with them.
    """
    from lowprec.model import has_bf16

    if device.type == "cpu":
        return None if kind == "fp32" or (kind == "bf16" and has_bf16(device)) else "the processor has no units for it"
    least = {"bf16": (8, 0), "tf32": (8, 0), "int8": (8, 0), "fp8": (8, 9)}.get(kind, (0, 0))
    if torch.cuda.get_device_capability(device) < least:
        return f"it needs compute capability {'.'.join(map(str, least))}"
    try:
        _Operands(kind, device).milliseconds(Shape(64, 64, 64, ""))
    except Exception as error:  # whatever a kernel or a library raises: the other kinds can be measured all the same
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None


def _least_kernel_ms(device: torch.device) -> float:
    """Of a kernel that moves next to nothing, in a row of such, as a step's kernels follow each other. Around a single
    one, events take as long again: 4.4 to 4.8 us together on an H100, where whole kernels of replayed steps take 1.8.
    """
    tiny = torch.zeros(16, device=device)
    if device.type != "cuda":
        return milliseconds(lambda: tiny.add_(1), repeat_ms=15, device=device)

    def row() -> None:
        for _ in range(ROW):
            tiny.add_(1)

    return graph_milliseconds(row) / ROW


def _tflops(samples: list[Sample]) -> float:
    """The rate that large products reach: the 95th percentile, since the best one may be luck."""
    return float(np.quantile([2 * s.m * s.n * s.k / s.ms / 1e9 for s in samples], 0.95))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _power_w(device: torch.device) -> float | None:
    """The board's limit; None where no driver tells."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetEnforcedPowerLimit(nvml_handle(pynvml, device)) / 1e3
    except Exception:  # not installed, or whatever a driver answers
        return None


def pinned_gib(most_gib: float = 4.0) -> float:
    """The largest power of two of GiB that can be pinned, up to ``most_gib`` and half the free memory."""
    pinned, size = 0.0, 0.5
    while size <= min(most_gib, psutil.virtual_memory().available / GIB / 2):
        with suppress(UserError):
            HostMemory(int(size * GIB), pin=True).close()
            pinned = size
        if pinned < size:
            break
        size *= 2
    return pinned
