"""What a machine can do: figures of named cards, and this machine's as ``lowprec doctor --measure`` found them."""

from lowprec.machine.cards import NAMED_CARDS, named_card
from lowprec.machine.footprint import Footprint, footprint
from lowprec.machine.machine import Machine
from lowprec.machine.profile import this_machine

__all__ = ["NAMED_CARDS", "Footprint", "Machine", "footprint", "named_card", "this_machine"]
