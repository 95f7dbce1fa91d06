"""``EnergyMeter``: joules of the GPUs that a run uses, or of the processor where it uses none.

In this order: NVML's counter of a card's whole energy (Volta and newer); where a driver hides it, the board's limit
times the time, named an estimate; without a GPU the processor's RAPL counters (package and DRAM), which Linux shows to
root alone unless told otherwise; else nothing, with the reason. A GPU's figure counts the card and not its host.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """What a meter read."""

    joules: float | None
    """Since the meter's start; None where nothing can be read."""
    seconds: float
    source: str
    """``nvml``, ``board limit`` (an estimate), ``rapl``, or ``none``."""
    note: str
    """What is counted, or why there is nothing to count."""

    @property
    def watts(self) -> float | None:
        """Mean power; None where unknown."""
        return self.joules / self.seconds if self.joules is not None and self.seconds > 0 else None


class EnergyMeter:
    """Starts when it is made; ``read()`` at any later time. ``keep_up()`` at least every ten minutes: RAPL's counters
    wrap."""

    def __init__(self, devices: Sequence[torch.device] = (), powercap: Path | None = None) -> None:
        """Args:
        devices: the GPUs to count; none of type ``cuda`` means the processor.
        powercap: where the kernel shows RAPL; None for its usual place.
        """
        gpus = [device for device in devices if device.type == "cuda"]
        self.source, self.note, self._sources = _gpu_sources(gpus) if gpus else _cpu_sources(powercap or POWERCAP)
        self._joules = 0.0
        self._began = time.perf_counter()
        self._last = [read() for read, _ in self._sources]

    def read(self) -> Energy:
        """Joules since the meter was made."""
        for index, (read, wrap) in enumerate(self._sources):
            now = read()
            step = now - self._last[index]
            self._joules += step + wrap if step < 0 else step
            self._last[index] = now
        seconds = time.perf_counter() - self._began
        return Energy(
            joules=self._joules if self._sources else None, seconds=seconds, source=self.source, note=self.note
        )

    def keep_up(self) -> None:
        """Read the counters that wrap; others, which a driver may take long to answer, are only read when asked."""
        if any(wrap for _, wrap in self._sources):
            self.read()


_Source = tuple[Callable[[], float], float]
"""A counter in joules, and the value at which it starts again from 0 (0: never)."""


def nvml_handle(nvml: ModuleType, device: torch.device) -> Any:
    """NVML's handle of a CUDA device, found by its UUID: NVML does not follow CUDA_VISIBLE_DEVICES."""
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _gpu_sources(gpus: Sequence[torch.device]) -> tuple[str, str, list[_Source]]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [nvml_handle(pynvml, device) for device in gpus]
    except Exception as error:  # not installed, or whatever a driver answers
        return "none", f"NVML cannot be asked ({_text(error)}), so neither the energy nor the limit is known", []
    cards = "the card" if len(gpus) == 1 else f"{len(gpus)} cards"
    try:
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        counters: list[_Source] = [(partial(_nvml_joules, pynvml, handle), 0.0) for handle in handles]
        return "nvml", f"NVML's counter of {cards}, without the host", counters
    except Exception as error:
        hidden = _text(error)
    try:
        watts = sum(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3 for handle in handles)
    except Exception as error:
        return "none", f"NVML hides the energy ({hidden}) and the power limit ({_text(error)})", []
    note = f"an estimate, at most: NVML hides the counter ({hidden}), so the limit of {watts:.0f} W times the time"
    return "board limit", note, [(lambda: watts * time.perf_counter(), 0.0)]


def _nvml_joules(nvml: ModuleType, handle: Any) -> float:
    return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _cpu_sources(powercap: Path) -> tuple[str, str, list[_Source]]:
    """Packages (``intel-rapl:0``; AMD's too) and their DRAM; cores and graphics are parts of the package."""
    domains = [path for path in sorted(powercap.glob("intel-rapl:*")) if (path / "energy_uj").exists()]
    domains = [path for path in domains if path.name.count(":") == 1 or _line(path / "name") == "dram"]
    if not domains:
        return "none", "no GPU, and the kernel shows no RAPL counters (virtual machines have none)", []
    try:
        sources: list[_Source] = [
            (partial(_rapl_joules, path), int(_line(path / "max_energy_range_uj")) / 1e6) for path in domains
        ]
        for read, _ in sources:
            read()
    except PermissionError:
        remedy = f"sudo chmod a+r {powercap}/*/energy_uj shows them until the next start"
        return "none", f"no GPU, and only root may read the RAPL counters: {remedy}", []
    except (OSError, ValueError) as error:
        return "none", f"no GPU, and the RAPL counters cannot be read ({_text(error)})", []
    return "rapl", "RAPL: the processor and its memory, with whatever else runs on them", sources


def _rapl_joules(path: Path) -> float:
    return int(_line(path / "energy_uj")) / 1e6


def _line(path: Path) -> str:
    return path.read_text().strip()


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
