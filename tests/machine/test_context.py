"""A process's own memory of a card is told from that of others."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from lowprec.machine import context
from lowprec.machine.cards import CONTEXT_MIB
from lowprec.machine.context import LEAST_MIB, MOST_MIB, fresh_context, own_context, process_bytes, settle

MIB = 2**20


@pytest.mark.parametrize(
    ("counted_mib", "missing_mib", "mib", "source"),
    [
        (480, 12_000, 480, "NVML"),  # others hold 11 GiB: they do not count
        (None, 480, 480, "free memory"),
        (None, 12_000, CONTEXT_MIB, "assumed"),
        (None, -300, CONTEXT_MIB, "assumed"),  # somebody gave back more than the context took
        (0, 480, 480, "free memory"),  # a driver that lists the process without a figure
        (-2, 0, CONTEXT_MIB, "assumed"),
    ],
)
def test_what_can_be_no_single_context_is_not_taken_for_one(counted_mib, missing_mib, mib, source):
    found = settle(None if counted_mib is None else counted_mib * MIB, missing_mib * MIB)
    assert (found.mib, found.source) == (mib, source)
    assert ("assumed" in str(found)) is found.assumed is (source == "assumed")


@pytest.mark.parametrize(("used", "expected"), [(700 * MIB, 700 * MIB), (None, None)])
def test_nvml_counts_this_process_alone(monkeypatch, used, expected):
    listed = [SimpleNamespace(pid=1, usedGpuMemory=30_000 * MIB), SimpleNamespace(pid=os.getpid(), usedGpuMemory=used)]
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetComputeRunningProcesses=lambda handle: listed)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(context, "nvml_handle", lambda module, device: str(device))
    assert process_bytes(torch.device("cuda", 0), os.getpid()) == expected
    assert process_bytes(torch.device("cuda", 0), os.getpid() + 1) is None, "a container's numbers are others"


def test_without_a_driver_nothing_is_counted():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert process_bytes(torch.device("cuda", 0), os.getpid()) is None


@pytest.mark.gpu
def test_tensors_are_no_part_of_the_context():
    device = torch.device("cuda", torch.cuda.current_device())
    before = own_context(device)
    held = torch.empty(3 << 30, dtype=torch.uint8, device=device)
    after = own_context(device)
    del held
    torch.cuda.empty_cache()
    for found in (before, after, fresh_context(device)):
        assert LEAST_MIB <= found.mib <= (2 * MOST_MIB if found.source == "NVML" else MOST_MIB)
    if before.source == after.source == "NVML":
        assert after.mib == pytest.approx(before.mib, abs=64)
