"""Fused kernels put on one model instance, never on the process: norms, gated MLPs, rotary embeddings, and the loss."""

from lowprec.fused.report import FusedRow
from lowprec.fused.surgery import fuse

__all__ = ["FusedRow", "fuse"]
