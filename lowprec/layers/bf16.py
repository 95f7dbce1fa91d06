"""The scheme that changes nothing: linear layers stay as the model has them, in ``model.dtype``."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lowprec.option import option


@option("weights", "bf16")
@dataclass(kw_only=True, slots=True)
class BF16:
    """Plain linear layers. The name is that of the usual case: with ``model.dtype=fp32`` they are fp32."""

    option_name: ClassVar[str]

    def why_not(self, linear: nn.Linear, frozen: bool) -> str | None:
        return None

    def convert(self, linear: nn.Linear, frozen: bool) -> nn.Linear:
        return linear

    def kernel(self, linear: nn.Linear) -> str:
        return f"torch matmul {str(linear.weight.dtype).removeprefix('torch.')}"
