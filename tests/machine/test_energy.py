import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowprec.machine import energy
from lowprec.machine.energy import EnergyMeter


def domain(root: Path, name: str, label: str, microjoules: int, wrap: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def test_rapl_counts_packages_and_dram_once_and_follows_a_counter_that_wraps(tmp_path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 900_000)
    dram = domain(tmp_path, "intel-rapl:0:1", "dram", 100_000)
    core = domain(tmp_path, "intel-rapl:0:0", "core", 5_000)
    meter = EnergyMeter(powercap=tmp_path)
    (package / "energy_uj").write_text("200000")  # 100000 to the end, then 200000
    (dram / "energy_uj").write_text("150000")
    (core / "energy_uj").write_text("999999")  # a part of the package
    first = meter.read()
    assert first.source == "rapl" and first.joules == pytest.approx(0.35)
    (package / "energy_uj").write_text("300000")
    assert meter.read().joules == pytest.approx(0.45)
    assert first.watts == pytest.approx(first.joules / first.seconds)


def test_without_counters_there_is_no_figure_and_a_reason(tmp_path):
    found = EnergyMeter(powercap=tmp_path).read()
    assert (found.joules, found.watts, found.source) == (None, None, "none")
    assert "no RAPL counters" in found.note


def test_counters_that_only_root_may_read(tmp_path, monkeypatch):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    read_text = Path.read_text

    def refuse(path, *args, **kwargs):
        if path == package / "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    found = EnergyMeter(powercap=tmp_path).read()
    assert found.joules is None and "sudo chmod a+r" in found.note


class Nvml:
    """What the meter asks of NVML."""

    def __init__(self, millijoules: int | None, milliwatts: int | None = 115_000) -> None:
        self.millijoules, self.milliwatts = millijoules, milliwatts

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.millijoules is None:
            raise RuntimeError("Not Supported")
        return self.millijoules

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        if self.milliwatts is None:
            raise RuntimeError("No Permission")
        return self.milliwatts


def meter_on(nvml: Nvml, monkeypatch) -> EnergyMeter:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(energy, "nvml_handle", lambda module, device: str(device))
    return EnergyMeter([torch.device("cuda", 0)])


def test_nvml_counts_millijoules(monkeypatch):
    nvml = Nvml(5_000)
    meter = meter_on(nvml, monkeypatch)
    nvml.millijoules = 12_500
    assert (meter.read().source, meter.read().joules) == ("nvml", 7.5)


def test_a_hidden_counter_becomes_an_estimate_by_the_limit_and_is_called_one(monkeypatch):
    clock = SimpleNamespace(now=5.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(energy, "time", clock)
    meter = meter_on(Nvml(None), monkeypatch)
    clock.now = 7.0
    found = meter.read()
    assert found.source == "board limit" and "an estimate" in found.note and "115 W" in found.note
    assert (found.joules, found.seconds, found.watts) == (230.0, 2.0, 115.0)


def test_where_all_is_hidden_there_is_no_figure(monkeypatch):
    found = meter_on(Nvml(None, None), monkeypatch).read()
    assert found.joules is None and "No Permission" in found.note


@pytest.mark.gpu
def test_a_busy_gpu_uses_energy():
    device = torch.device("cuda", torch.cuda.current_device())
    meter = EnergyMeter([device])
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(200):
        x @ x
    torch.cuda.synchronize()
    found = meter.read()
    assert found.source in ("nvml", "board limit") and found.watts is not None and 20 < found.watts < 2000
