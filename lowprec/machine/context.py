"""Device memory that a process takes beside PyTorch's allocator: CUDA's context, and the kernels that were loaded.

Others may be on the card, a display or another job, and come and go. NVML counts by process, where the driver lets it:
not in WSL, and seldom in containers, where processes have other numbers. Else the memory of the whole device tells, as
long as one context can take what is missing; else a typical context is assumed, and called so.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

import torch

from lowprec.errors import UserError
from lowprec.machine.cards import CONTEXT_MIB
from lowprec.machine.energy import nvml_handle

LEAST_MIB, MOST_MIB = 50, 1024
"""More or less is no single context: somebody else took or gave back memory."""
TRIES = 3
"""Fresh processes that are started while others change the memory of the card."""


@dataclass(frozen=True, slots=True)
class Context:
    """What one process takes of a device beside its tensors."""

    nbytes: int
    source: str
    """``NVML``; ``free memory`` (of the whole device, so that small others are in it); or ``assumed``."""

    def __str__(self) -> str:
        return f"{self.nbytes / 2**30:.2f} GiB{' (assumed)' if self.assumed else ''}"

    @property
    def mib(self) -> float:
        return self.nbytes / 2**20

    @property
    def assumed(self) -> bool:
        return self.source == "assumed"


def settle(counted: int | None, missing: int) -> Context:
    """A process's context.

    Args:
        counted: bytes, by NVML, of this process alone; None where it does not tell.
        missing: bytes that the whole device lost, to the context and whoever else was there.
    """
    if counted is not None and counted >= LEAST_MIB * 2**20:
        return Context(counted, "NVML")
    if LEAST_MIB * 2**20 <= missing <= MOST_MIB * 2**20:
        return Context(missing, "free memory")
    return Context(int(CONTEXT_MIB * 2**20), "assumed")


def own_context(device: torch.device) -> Context:
    """Of this process, as it is now."""
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    counted = process_bytes(device, os.getpid())
    return settle(None if counted is None else counted - reserved, total - free - reserved)


def fresh_context(device: torch.device, begun: "FreshProcess | None" = None) -> Context:
    """Of a process that has just started, cuBLAS loaded.

    Args:
        begun: a process that was started earlier, since importing PyTorch takes it seconds.

    Raises:
        UserError: the device takes no second process.
    """
    found = (begun or FreshProcess(device)).context()
    for _ in range(TRIES - 1):
        found = FreshProcess(device).context() if found.assumed else found
    return found


def process_bytes(device: torch.device, pid: int) -> int | None:
    """Device memory of the process ``pid``, all of it, as NVML counts it; None where it does not tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(nvml_handle(pynvml, device))
    except Exception:  # not installed, or whatever a driver answers
        return None
    return next((process.usedGpuMemory for process in processes if process.pid == pid), None)


_CHILD = """
import sys, torch
print("imported", flush=True)
sys.stdin.readline()
x = torch.ones(256, 256, device=sys.argv[1], dtype=torch.bfloat16)
(x @ x).sum().item()
print(torch.cuda.memory_reserved(sys.argv[1]), flush=True)
sys.stdin.readline()
"""
"""Importing takes seconds, in which others may come and go: what is free is read when that is over."""


class FreshProcess:
    """A process that waits, with PyTorch imported, to use the device as little as a process can."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        index = torch.cuda.current_device() if device.index is None else device.index
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, f"cuda:{index}"],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def context(self) -> Context:
        """Let it go on, and end it.

        Raises:
            UserError: the device takes no second process, or the machine none.
        """
        child, device = self._child, self._device
        assert child.stdin is not None and child.stdout is not None
        try:
            if not child.stdout.readline():
                raise UserError("A second Python process with PyTorch ends at once: is there enough memory for it?")
            before = torch.cuda.mem_get_info(device)[0]
            child.stdin.write("\n")
            child.stdin.flush()
            reserved = child.stdout.readline()
            if not reserved:
                raise UserError("A second process cannot use the GPU beside this one: is it in exclusive mode?")
            missing = before - torch.cuda.mem_get_info(device)[0] - int(reserved)
            counted = process_bytes(device, child.pid)
            return settle(None if counted is None else counted - int(reserved), missing)
        finally:
            child.communicate("\n")

    def close(self) -> None:
        """End it, whether it was asked or not."""
        self._child.kill()
        self._child.communicate()
