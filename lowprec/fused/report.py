"""What became of the parts of a model that have a fused kernel: a row each in the wrap report."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class FusedRow:
    """One kind of part, of one class."""

    part: str
    """``norm``, ``mlp``, ``rope`` or ``loss``."""
    module: str
    """The class in the model."""
    modules: int
    """How many there are."""
    kernel: str
    """What computes them."""
    reason: str = ""
    """Why it is the model's own code; empty where it is not."""
    note: str = ""
    """Why the kernel does not do more, where another one would."""

    @property
    def fused(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return f"{self.part}: {self.modules} {self.module} by {self.what}"

    @property
    def what(self) -> str:
        """The kernel, with the reason or note in brackets."""
        why = self.reason or self.note
        return f"{self.kernel} ({why})" if why else self.kernel
