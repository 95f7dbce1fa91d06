"""The machine itself: processor, memory, disk, GPUs."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import torch

from lowprec.doctor.check import Check, attempt

GROUP = "machine"
GIB = 2**30


def check_machine() -> Iterator[Check]:
    """What there is, and whether it can be used."""
    yield Check(group=GROUP, name="system", ok=None, found=platform.platform())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check(group=GROUP, name="processor", ok=None, found=f"{_processor()}, {cores} cores to use")
    memory = psutil.virtual_memory()
    found = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free"
    yield Check(group=GROUP, name="memory", ok=None, found=found)
    yield attempt(GROUP, "disk", _disk, remedy="Change to a folder that you may write to.", required=True)
    yield from _gpus()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _disk() -> str:
    with tempfile.NamedTemporaryFile(dir=".") as file:
        file.write(b"0")
        os.fsync(file.fileno())
    return f"{shutil.disk_usage('.').free / GIB:.1f} GiB free in {Path.cwd()}, which can be written"


def _gpus() -> Iterator[Check]:
    driver = _driver()
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            reason = f"this PyTorch ({torch.__version__}) is built without CUDA"
            remedy = "Install PyTorch's build for CUDA." if driver else "Without an NVIDIA GPU nothing is to be done."
        elif driver:
            reason = f"PyTorch (CUDA {torch.version.cuda}) cannot use the GPU, driver {driver}"
            remedy = "Update the driver, and look at CUDA_VISIBLE_DEVICES."
        else:
            reason = "no NVIDIA driver answers"
            remedy = "Install the driver, where there is an NVIDIA GPU."
        yield Check(group=GROUP, name="GPU", ok=False, reason=reason, remedy=remedy)
    for index in range(torch.cuda.device_count()):
        yield attempt(GROUP, f"GPU {index}", partial(_gpu, index), remedy="Look at nvidia-smi.", required=True)
    yield attempt(GROUP, "NVML", _nvml, remedy="pip install nvidia-ml-py; it needs an NVIDIA driver.")


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    (torch.ones(64, 64, device=f"cuda:{index}") @ torch.ones(64, 64, device=f"cuda:{index}")).sum().item()
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, capability {capability}, {total / GIB:.1f} GiB, {free / GIB:.1f} free"


def _nvml() -> str:
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        watts = [pynvml.nvmlDeviceGetPowerUsage(handle) / 1000 for handle in handles]
        return f"driver {pynvml.nvmlSystemGetDriverVersion()}, power now {', '.join(f'{w:.0f} W' for w in watts)}"
    finally:
        pynvml.nvmlShutdown()


def _driver() -> str | None:
    """The NVIDIA driver's version as the kernel module reports it."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None
