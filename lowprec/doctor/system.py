"""The machine without its GPUs: system, processor, memory, limits."""

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from lowprec.doctor.check import Check, attempt
from lowprec.machine.energy import EnergyMeter
from lowprec.machine.profile import processor

GROUP = "machine"
GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_BYTES = 256 << 20


def check_system() -> Iterator[Check]:
    """What there is, and which limits it has."""
    yield Check(group=GROUP, name="system", ok=None, found=platform.platform() + (", in WSL" if in_wsl() else ""))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check(group=GROUP, name="processor", ok=None, found=f"{processor()}, {cores} cores to use")
    memory = psutil.virtual_memory()
    found = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free"
    yield Check(group=GROUP, name="memory", ok=None, found=found)
    yield attempt(
        GROUP,
        "shared memory",
        _shared_memory,
        remedy="Several processes need it: docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm.",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = f"{_limit(soft)} (ulimit -l), at most {_limit(hard)}"
    yield Check(group=GROUP, name="locked memory", ok=None, found=found)
    if not torch.cuda.is_available():  # the energy of a GPU is its own counter's
        yield attempt(
            GROUP,
            "processor's energy",
            _energy,
            remedy="Without it reports leave out the energy of runs that use no GPU.",
        )


def in_wsl() -> bool:
    """Whether this Linux runs inside Windows."""
    try:
        return "microsoft" in Path("/proc/sys/kernel/osrelease").read_text().lower()
    except OSError:
        return False


def _shared_memory() -> str:
    free, total = shutil.disk_usage(SHARED_MEMORY).free, shutil.disk_usage(SHARED_MEMORY).total
    if total < LEAST_SHARED_BYTES:
        raise RuntimeError(f"{SHARED_MEMORY} has {total / 2**20:.0f} MiB, which exchange between processes outgrows")
    return f"{SHARED_MEMORY} has {total / GIB:.1f} GiB, {free / GIB:.1f} free"


def _limit(nbytes: int) -> str:
    return "unlimited" if nbytes == resource.RLIM_INFINITY else f"{nbytes / 2**20:.3g} MiB"


def _energy() -> str:
    meter = EnergyMeter()
    if meter.read().joules is None:
        raise RuntimeError(meter.note)
    return meter.note
