"""A device with less memory than it has."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowprec.errors import UserError
from lowprec.machine.context import own_context
from lowprec.profiling.alive import Alive
from lowprec.profiling.memory import GIB

KEY = "profile.vram_limit_gib"


@contextmanager
def limited(device: torch.device, gib: float | None) -> Iterator[str | None]:
    """Let ``device`` raise ``torch.OutOfMemoryError`` above ``gib``, the context included; None changes nothing.

    On CUDA the allocator refuses. Elsewhere storages are counted as they come, which is slow and counts tensors alone.

    Yields:
        What the user should be told.

    Raises:
        UserError: not even the context fits, or the device has less.
    """
    if gib is None:
        yield None
        return
    if device.type != "cuda":
        with Alive(device, limit=int(gib * GIB)):
            yield (
                f"{KEY}={gib:g} is simulated on this processor by counting tensors, which makes every step slower: its "
                "times mean nothing."
            )
        return
    context = own_context(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(device).total_memory
    if gib * GIB > total:
        raise UserError(f"{KEY}={gib:g} is more than this GPU's {total / GIB:.1f} GiB. Choose a smaller limit or none.")
    if gib * GIB <= context.nbytes:
        raise UserError(f"{KEY}={gib:g} leaves nothing beside CUDA's own context, which takes {context} here.")
    torch.cuda.set_per_process_memory_fraction((gib * GIB - context.nbytes) / total, index)
    try:
        yield (
            f"This GPU behaves as one of {gib:g} GiB, {context} of them the context. Its speed is still "
            f"that of the {torch.cuda.get_device_name(device)}."
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
