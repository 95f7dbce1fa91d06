"""Optimizers over state stores, their recipe options, and their checkpoints."""

from lowprec.optim.adamw import AdamW

__all__ = ["AdamW"]
