"""GPUs: whether they work, what the driver tells, and how memory behaves at its limits."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from lowprec.doctor.check import Check, attempt
from lowprec.doctor.system import in_wsl
from lowprec.machine.energy import EnergyMeter

GROUP = "GPU"
GIB = 2**30
PINNED_GIB = 2.0
"""What state_store=ssd pins by default."""


def check_gpus() -> Iterator[Check]:
    """Every GPU by a product on it; then what the first one's memory does."""
    if not torch.cuda.is_available():
        yield _no_gpu()
    for index in range(torch.cuda.device_count()):
        yield attempt(GROUP, f"GPU {index}", partial(_gpu, index), remedy="Look at nvidia-smi.", required=True)
    yield attempt(GROUP, "NVML", _nvml, remedy="It needs an NVIDIA driver, and pip install nvidia-ml-py.")
    if torch.cuda.is_available():
        yield attempt(
            GROUP,
            "energy counter",
            _energy,
            remedy="Reports estimate a run's energy by the board's limit, and say so. Some drivers (WSL, old cards) "
            "hide the counter for good.",
        )
        yield attempt(
            GROUP,
            "pinned memory",
            _pinned,
            remedy="Lower state_store.pinned_gib; in WSL give Linux more memory (memory=... in .wslconfig).",
        )
        yield attempt(
            GROUP,
            "expandable segments",
            _expandable,
            remedy="Unset PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF, or put expandable_segments:True into them.",
        )
        yield attempt(
            GROUP,
            "no spill into host memory",
            _no_spill,
            remedy="In Windows: NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy: Prefer No "
            "Sysmem Fallback. Otherwise a run that does not fit becomes many times slower without a word.",
        )


def _no_gpu() -> Check:
    driver = _driver()
    if torch.version.cuda is None:
        reason = f"this PyTorch ({torch.__version__}) is built without CUDA"
        remedy = "Install PyTorch's build for CUDA." if driver else "Without an NVIDIA GPU nothing is to be done."
    elif driver:
        reason = f"PyTorch (CUDA {torch.version.cuda}) cannot use the GPU, driver {driver}"
        remedy = "Update the driver, and look at CUDA_VISIBLE_DEVICES."
    elif in_wsl():
        reason, remedy = "no NVIDIA driver answers in WSL", "Install or update the driver in Windows, not in Linux."
    else:
        reason, remedy = "no NVIDIA driver answers", "Install the driver, where there is an NVIDIA GPU."
    return Check(group=GROUP, name="GPU", ok=False, reason=reason, remedy=remedy)


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    x = torch.ones(64, 64, device=f"cuda:{index}")
    if (x @ x).sum().item() != 64.0**3:
        raise RuntimeError("a product of ones is wrong")
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, capability {capability}, {total / GIB:.1f} GiB, {free / GIB:.1f} free"


def _nvml() -> str:
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    version = pynvml.nvmlSystemGetCudaDriverVersion()
    cuda = f"up to CUDA {version // 1000}.{version % 1000 // 10}, PyTorch's is {torch.version.cuda}"
    watts = [pynvml.nvmlDeviceGetPowerUsage(handle) / 1000 for handle in handles]
    power = ", ".join(f"{w:.0f} W" for w in watts)
    return f"driver {pynvml.nvmlSystemGetDriverVersion()}, {cuda}, power now {power}"


def _energy() -> str:
    device = torch.device("cuda", torch.cuda.current_device())
    meter = EnergyMeter([device])
    x = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    while meter.read().seconds < 0.5:  # the counter moves every 20 to 100 ms
        (x @ x).sum().item()
    found = meter.read()
    if meter.source != "nvml":
        raise RuntimeError(meter.note)
    if not found.joules:
        raise RuntimeError("NVML's counter stands still")
    return f"{found.watts:.0f} W while multiplying"


def _pinned() -> str:
    from lowprec.machine.measure import pinned_gib

    pinned = pinned_gib(PINNED_GIB)
    if pinned < PINNED_GIB:
        raise RuntimeError(f"{pinned:g} GiB of host memory can be pinned, and state_store=ssd asks for {PINNED_GIB:g}")
    return f"{pinned:g} GiB pinned at once (state_store.pinned_gib's default)"


def _expandable() -> str:
    tensor = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    address = tensor.data_ptr()
    segments = [s for s in torch.cuda.memory_snapshot() if s["address"] <= address < s["address"] + s["total_size"]]
    if not any(segment.get("is_expandable") for segment in segments):
        names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise RuntimeError(f"the allocator does not use them ({said or 'nothing in the environment asks for them'})")
    return "on: changing lengths fragment no memory"


def _no_spill() -> str:
    """Ask for more than the card has: a driver that grants it takes host memory without a word."""
    total = torch.cuda.mem_get_info()[1]
    try:
        torch.empty(total + (256 << 20), dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return "more than the card has is refused"
    finally:
        torch.cuda.empty_cache()
    raise RuntimeError(f"the driver granted more than the {total / GIB:.1f} GiB of the card{', in WSL' * in_wsl()}")


def _driver() -> str | None:
    """The NVIDIA driver's version as the kernel module reports it."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None
