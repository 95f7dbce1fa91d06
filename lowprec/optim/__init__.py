"""Optimizers over state stores, and their checkpoints."""

from lowprec.optim.adamw import AdamW
from lowprec.optim.checkpoints import load_optimizer_states, save_optimizer_states

__all__ = ["AdamW", "load_optimizer_states", "save_optimizer_states"]
