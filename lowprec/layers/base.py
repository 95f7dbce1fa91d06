"""What a weight scheme is: the contract between ``prepare`` and the files beside this one."""

from typing import ClassVar, Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class WeightScheme(Protocol):
    """How the weights of linear layers are stored and multiplied. One dataclass a scheme, registered with
    ``@option("weights", name)``.

    ``convert`` returns a subclass of ``nn.Linear`` (PEFT refuses any other class) that keeps ``in_features``,
    ``out_features`` and ``bias``, whose state dict has the keys ``weight`` and ``bias`` (bitsandbytes' own layer adds
    its quantisation state), and which gives ``dequantized_weight()``.
    """

    option_name: ClassVar[str]

    def why_not(self, linear: nn.Linear, frozen: bool) -> str | None:
        """Why this layer cannot be converted, in words for the report; None where it can."""

    def convert(self, linear: nn.Linear, frozen: bool) -> nn.Linear:
        """The layer that takes the place of ``linear``, on the same device. It may take over its tensors."""

    def kernel(self, linear: nn.Linear) -> str:
        """The name of the product that will run, as the report prints it."""
