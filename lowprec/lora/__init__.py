"""LoRA computed by one autograd function for all projections of one input. ``fuse(model)`` switches it on."""

from lowprec.lora.fuse import FuseReport, fuse

__all__ = ["FuseReport", "fuse"]
