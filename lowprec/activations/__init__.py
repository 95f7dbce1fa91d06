"""What backward needs, kept, computed again, or sent to host memory: ``train.gradient_checkpointing``."""

from lowprec.activations.policy import POLICIES, Activations, keep_activations, why_no_graphs

__all__ = ["POLICIES", "Activations", "keep_activations", "why_no_graphs"]
