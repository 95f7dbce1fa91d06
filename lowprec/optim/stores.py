"""``state_store`` by name: the one place that knows all stores."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowprec.errors import UserError
from lowprec.optim.format import StateFormat
from lowprec.optim.layout import make_layout
from lowprec.optim.memory_store import MemoryStore
from lowprec.optim.store import StateStore

STATE_STORES = ("gpu", "cpu", "ssd")
CHUNK_BYTES = 8 << 20


def open_store(
    state_store: str,
    path: str | Path | Sequence[str | Path] | None,
    names: Sequence[str],
    params: Sequence[Tensor],
    formats: dict[int, StateFormat],
    devices: dict[int, torch.device],
) -> StateStore:
    """The store of the parameters numbered in ``formats``, which are updated on ``devices``.

    Raises UserError where the choice cannot be had.
    """
    if state_store not in STATE_STORES:
        raise UserError(f"state_store={state_store!r} is unknown: choose one of {', '.join(STATE_STORES)}.")
    if path is not None and state_store != "ssd":
        raise UserError(
            f"state_store={state_store} keeps no files: remove state_store.path, or choose state_store=ssd."
        )
    numels = {i: params[i].numel() for i in formats}
    if state_store == "gpu":
        return MemoryStore(make_layout(numels, formats, None), params)
    if len(set(devices.values())) > 1:
        places = ", ".join(sorted(map(str, set(devices.values()))))
        raise UserError(
            f"state_store={state_store} streams to one device, but the weights are on {places}: choose gpu."
        )
    if state_store == "cpu":
        return MemoryStore(make_layout(numels, formats, CHUNK_BYTES), params, torch.device("cpu"))
    raise UserError("soon")
