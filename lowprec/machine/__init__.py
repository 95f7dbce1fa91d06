"""What a machine can do: figures of named cards, and this machine's as ``lowprec doctor --measure`` found them."""

from lowprec.machine.cards import NAMED_CARDS, card_of, named_card
from lowprec.machine.energy import Energy, EnergyMeter
from lowprec.machine.footprint import Footprint, footprint, run_footprint
from lowprec.machine.machine import Machine
from lowprec.machine.profile import this_machine

__all__ = [
    "NAMED_CARDS",
    "Energy",
    "EnergyMeter",
    "Footprint",
    "Machine",
    "card_of",
    "footprint",
    "named_card",
    "run_footprint",
    "this_machine",
]
