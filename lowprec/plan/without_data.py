"""``no_data()``: the mode under which tensors have shapes, dtypes and storages, and no data.

It is PyTorch's ``FakeTensorMode``, which takes about 0.1 ms an operator, most of it to find the operator's result in
its own cache. A step repeats the same few hundred calls layer by layer, so this mode remembers what each call made of
inputs of that form and makes it again itself.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
)

_ASKS_DEVICE = torch.ops.prim.device.default
_DEPENDS_ON_MORE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


def no_data() -> FakeTensorMode:
    return _NoData()


class _Forgetful(FakeTensorConverter):
    """Keeps no weak references to what it makes: ``Module.to`` refuses to swap a parameter that has one."""

    def set_tensor_memo(self, t: torch.Tensor, v: Any) -> None:
        pass


class _TooSpecialError(Exception):
    """Of a call whose result is not remembered."""


@dataclass(frozen=True, slots=True)
class _Result:
    """One tensor that an operator returned."""

    same_as: int | None
    """The input that it is itself."""
    shares: int | None = None
    """The input whose storage it views; None for a storage of its own."""
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


class _NoData(FakeTensorMode):
    _known: ClassVar[dict[tuple, tuple[type | None, list[_Result | int | None]]]] = {}
    """Call -> the kind of sequence that it returns, and what is in it. Of all models, as PyTorch's own cache is."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # tables of codes that libraries keep as they are
        self.fake_tensor_converter = _Forgetful()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under it, and the guard against that costs as much as a call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ASKS_DEVICE:
            return args[0].fake_device
        inputs: list[Tensor] = []
        with torch._C.DisableTorchFunction():  # to read a shape is no call of the model's
            try:
                named = _form(tuple(kwargs.items()), inputs) if kwargs else ()
                key = func, torch.get_default_dtype(), _form(args, inputs), named
                known = self._known.get(key)
            except (_TooSpecialError, TypeError):  # TypeError: something that cannot be hashed
                return super().__torch_dispatch__(func, types, args, kwargs or {})
            if known is not None:
                return self._make(*known, inputs)
        out = super().__torch_dispatch__(func, types, args, kwargs or {})
        if _DEPENDS_ON_MORE.isdisjoint(func.tags) and func not in self.lift_fns:
            with torch._C.DisableTorchFunction():
                try:
                    several = list if isinstance(out, list) else tuple if isinstance(out, tuple) else None
                    self._known[key] = several, _results(out if several else (out,), inputs)
                except _TooSpecialError:
                    pass
        return out

    def _make(self, several: type | None, results: list[_Result | int | None], inputs: list[Tensor]) -> Any:
        made: list[Tensor | int | None] = []
        for result in results:
            if not isinstance(result, _Result):
                made.append(result)
                continue
            if result.same_as is not None:
                made.append(inputs[result.same_as])
                continue
            shape, stride, dtype = result.shape, result.stride, result.dtype
            if result.shares is None:
                plain = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                plain = torch.empty(0, dtype=dtype, device="meta")
                plain.set_(inputs[result.shares].untyped_storage(), result.offset, shape, stride)
            made.append(FakeTensor(self, plain, result.device))
        return made[0] if several is None else several(made)


def _form(value: Any, inputs: list[Tensor]) -> Any:
    """What an operator's result depends on, of one argument; its tensors go to ``inputs``."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:  # a small tensor whose numbers are known
            raise _TooSpecialError
        inputs.append(value)
        return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if kind is tuple or kind is list:
        return kind, *[_form(one, inputs) for one in value]
    if isinstance(value, Tensor):
        raise _TooSpecialError
    return kind, value  # 1, 1.0 and True are equal


def _results(outputs: Any, inputs: list[Tensor]) -> list[_Result | int | None]:
    """How to make the outputs again from inputs of the same form."""
    found: list[_Result | int | None] = []
    places = [tensor.untyped_storage()._cdata for tensor in inputs]
    new: set[int] = set()
    for out in outputs:
        if out is None or type(out) is int:  # a fused attention's longest sequences
            found.append(out)
            continue
        if type(out) is not FakeTensor or out.constant is not None or out.layout != torch.strided:
            raise _TooSpecialError
        same = next((i for i, tensor in enumerate(inputs) if tensor is out), None)
        place = out.untyped_storage()._cdata
        shares = places.index(place) if place in places else None
        if same is None and shares is None:
            needed = 1 + sum((size - 1) * step for size, step in zip(out.shape, out.stride(), strict=True))
            nbytes = needed * out.dtype.itemsize if out.numel() else 0
            if place in new or out.storage_offset() or out.untyped_storage().nbytes() != nbytes or out.is_complex():
                raise _TooSpecialError
            new.add(place)
        offset = int(out.storage_offset())
        found.append(_Result(same, shares, tuple(out.shape), out.stride(), offset, out.dtype, out.fake_device))
    return found
