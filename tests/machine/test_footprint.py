import pytest

from lowprec.machine import footprint
from lowprec.machine.footprint import CARD_EMBODIED_KG_CO2E, CARD_LIFE_HOURS, WORLD_G_CO2E_PER_KWH


def test_joules_and_hours_become_kwh_co2e_and_life():
    found = footprint(joules=7.2e6, gpu_hours=10)
    assert (found.energy_kwh, found.co2e_g) == (2.0, 2 * WORLD_G_CO2E_PER_KWH)
    assert found.card_life_share == pytest.approx(10 / CARD_LIFE_HOURS)
    assert found.embodied_co2e_g == pytest.approx(10 / CARD_LIFE_HOURS * CARD_EMBODIED_KG_CO2E * 1000)
    assert footprint(3.6e6, 0, grid_g_co2e_per_kwh=30).co2e_g == 30


def test_unknown_energy_stays_unknown():
    found = footprint(None, 1)
    assert found.energy_kwh is None and found.co2e_g is None and found.card_life_share > 0
