"""The weight of a layer that stores codes alone, as others read it: decoded when its numbers are needed, and not to be
written to."""

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

from lowprec.errors import UserError


class DecodedWeight(torch.Tensor):
    """A tensor that calls ``decode`` at the first operation on it: PEFT reads a weight's dtype and device twenty times
    a layer while it attaches an adapter. Operations give plain tensors. What would write to it is refused, since it
    would be lost."""

    _decode: Callable[[], torch.Tensor]
    _decoded: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, decode: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> "DecodedWeight":
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        weight._decode, weight._decoded = decode, None
        return weight

    def __init__(self, *args: object) -> None:
        pass

    @property
    def decoded(self) -> torch.Tensor:
        """Its numbers, as a plain tensor."""
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(value, cls) and argument.is_write:
                value._refuse()
        args, kwargs = tree_map_only(cls, lambda weight: weight.decoded, (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> "DecodedWeight":  # type: ignore[override]
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self._refuse()

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.decoded)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.decoded.numpy(*args, **kwargs)

    def _refuse(self) -> NoReturn:
        raise UserError(
            "this weight is stored as 8-bit codes and cannot be written to. To merge an adapter, use `lowprec merge`, "
            "which reads the original 16-bit files; to train the weight itself, wrap the model with frozen=False."
        )


def warn_that_decoded_is_saved(origin: str) -> None:
    """Say that a state dict of codes is none of the model's own weights. ``origin``: where those are, or empty."""
    warnings.warn(
        "the base is stored in 8 bits: a state dict holds its decoded weights, not the original ones"
        f"{f' ({origin})' if origin else ''}. Adapters are not affected; to merge one, use "
        "`lowprec merge`, which reads the original files.",
        stacklevel=3,
    )
