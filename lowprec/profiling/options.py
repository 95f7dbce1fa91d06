"""The recipe's group ``profile``: how ``lowprec profile`` measures, and whether ``train`` does."""

from dataclasses import dataclass

from lowprec.errors import UserError


@dataclass(kw_only=True, slots=True)
class Profile:
    """Read by ``lowprec profile``; ``vram_limit_gib`` and ``in_training`` by ``lowprec train``."""

    warmup_steps: int = 3
    """Steps before the measured ones: kernels are compiled and optimizer states made in them."""
    steps: int = 20
    """Measured steps. Two or three more follow that are watched closely and not timed."""
    vram_limit_gib: float | None = None
    """Let a large card behave as one with so much memory. Its speed stays its own. Without a GPU, storages are counted
    and the limit is a simulation."""
    output_dir: str | None = None
    """Where the figures go. None means ``profiles/<recipe name>``, with a number where that is taken."""
    in_training: bool = True
    """Time by phase in every row of ``metrics.jsonl``."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 1:
            raise UserError(
                f"profile.warmup_steps={self.warmup_steps} must be 1 or more: the first step makes what all others use."
            )
        if self.steps < 1:
            raise UserError(f"profile.steps={self.steps} must be 1 or more.")
        if self.vram_limit_gib is not None and self.vram_limit_gib <= 0:
            raise UserError(f"profile.vram_limit_gib={self.vram_limit_gib} must be above 0, or null for no limit.")
