"""Energy and card hours as kWh, CO2e and a share of a card's life. Sources of the factors: docs/footprint.md."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lowprec.machine.energy import Energy

J_PER_KWH = 3.6e6
WORLD_G_CO2E_PER_KWH = 473.0
"""World average of electricity in 2024: 14.6 Gt over 30.9 PWh (Ember, Global Electricity Review 2025)."""
CARD_LIFE_HOURS = 4 * 8766 * 0.45
"""15,800 busy hours: the middle of 3 to 5 years at 30 to 60 % use (Wu et al., Sustainable AI, 2022)."""
CARD_EMBODIED_KG_CO2E = 181.0
"""Making, shipping and scrapping an A100 PCIe 40 GB (ADEME, Life cycle assessments of GPUs for AI, 2026)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a run cost beside money."""

    energy_kwh: float | None
    """None where no energy is known."""
    co2e_g: float | None
    """From the energy alone."""
    grid_g_co2e_per_kwh: float
    gpu_hours: float
    card_life_share: float
    embodied_co2e_g: float
    """The share of the card's life times what making it emitted."""


def footprint(joules: float | None, gpu_hours: float, grid_g_co2e_per_kwh: float = WORLD_G_CO2E_PER_KWH) -> Footprint:
    """Args:
    joules: energy of the run, None where unknown.
    gpu_hours: hours times cards; 0 without a card.
    grid_g_co2e_per_kwh: intensity of the grid, grams of CO2 equivalent a kWh.
    """
    kwh = None if joules is None else joules / J_PER_KWH
    share = gpu_hours / CARD_LIFE_HOURS
    return Footprint(
        energy_kwh=kwh,
        co2e_g=None if kwh is None else kwh * grid_g_co2e_per_kwh,
        grid_g_co2e_per_kwh=grid_g_co2e_per_kwh,
        gpu_hours=gpu_hours,
        card_life_share=share,
        embodied_co2e_g=share * CARD_EMBODIED_KG_CO2E * 1e3,
    )


def run_footprint(
    energy: Energy, num_gpus: int, grid_g_co2e_per_kwh: float, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``footprint`` of ``report.json``: the fields of :class:`Footprint`, with what was metered and how.

    Args:
        earlier: the same of the process that this one resumes: both are added up.
    """
    seconds, joules = energy.seconds, energy.joules
    if earlier:
        seconds += earlier["seconds"]
        joules = None if joules is None or earlier["energy_j"] is None else joules + earlier["energy_j"]
    gpu_hours = energy.seconds * num_gpus / 3600 + (earlier["gpu_hours"] if earlier else 0.0)
    return {
        "seconds": round(seconds, 1),
        "energy_j": joules,
        "energy_source": energy.source,
        "energy_note": energy.note,
        **asdict(footprint(joules, gpu_hours, grid_g_co2e_per_kwh)),
    }
