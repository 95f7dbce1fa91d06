"""What is made of a trained weight and kept between calls, and when it has to be made again.

A weight's values may have changed when

- its version counter moved: in-place operations and ``load_state_dict``;
- it has another storage: ``weight.data = ...``, a gathered copy. The address does not tell, since the allocator hands a
  freed one out again;
- an optimizer took a step: some write by raw pointers or through ``.data``, which moves no counter.

Nothing is kept of a parameter that stands in for another one, such as the gathered copies of FSDP2: they are written to
behind the counter's back, at the same address. Nor under ``torch.compile``, whose graphs contain the casts, nor while
a CUDA graph is captured, whose replays must see new values.
"""

import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import Generic, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

Made = TypeVar("Made")


class WeightCache(Generic[Made]):
    """What was made of one parameter."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._owner = weakref.ref(weight)
        self._key: tuple | None = None
        self._made: Made | None = None
        self._told = False

    def get(self, weight: torch.Tensor, make: Callable[[], Made]) -> Made:
        """What ``make`` gave for these values of ``weight``, or gives now."""
        if torch.compiler.is_compiling() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return make()
        if self._owner() is not weight:
            self._tell()
            return make()
        key = _key_of(weight)
        if self._made is None or self._key != key:
            self._made, self._key = make(), key
        return self._made

    def _tell(self) -> None:
        if not self._told:
            warnings.warn(
                "weights.cache has no effect on an 8-bit layer whose weight is not the parameter that it was built "
                "with, as under FSDP2, which gathers a copy for each pass: the weight is quantised at each call.",
                stacklevel=2,
            )
            self._told = True


def _key_of(weight: torch.Tensor) -> tuple:
    storage = StorageWeakRef(weight.untyped_storage())  # as long as it is held, no other storage can be taken for it
    return storage, weight.storage_offset(), weight._version, weight.dtype, weight.shape, _optimizer_steps()[0]


@cache
def _optimizer_steps() -> list[int]:
    """How many steps the optimizers of this process have taken since the first call."""
    count = [0]

    def stepped(*arguments: object) -> None:
        count[0] += 1

    register_optimizer_step_post_hook(stepped)
    return count
