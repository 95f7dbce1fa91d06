"""Where the optimizer's states lie and how large they are, by the layout that the optimizer itself uses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowprec.optim.disk import GIB, aligned, whole_pages
from lowprec.optim.format import StateFormat
from lowprec.optim.layout import make_layout
from lowprec.optim.options import AdamWOptions, BitsAndBytesOptions, SsdStore
from lowprec.optim.ssd_files import make_slots
from lowprec.optim.ssd_store import MIN_BUFFERS
from lowprec.optim.staged_store import DEPTH
from lowprec.optim.stores import CHUNK_BYTES, memory_chunk_bytes, read_tuned

# bitsandbytes: smaller tensors keep fp32 states (min_8bit_size), and are not paged (optimizer.py, get_state_buffer).
BNB_MIN_8BIT = 4096
BNB_MIN_PAGED = 100_000
BNB_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Trained:
    """A parameter that trains."""

    name: str
    numel: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class States:
    """Bytes. ``device`` has an entry for every allocation: (parameter, or "" for a buffer of all, bytes)."""

    device: list[tuple[str, int]]
    host: int = 0
    """Pinned, or managed memory that the driver can move to the host."""
    disk: int = 0
    """Of one version of the files; a checkpoint on the same disk takes as much again."""
    step_read: int = 0
    """From the disk in a step."""
    step_written: int = 0
    step_to_device: int = 0
    """Over PCIe in a step, and as many back."""
    step_chunks: int = 0
    """In so many pieces."""


def states_of(recipe: Any, trained: list[Trained]) -> States:
    """The states of ``trained`` under the recipe's optimizer and store.

    Raises:
        UserError: a parameter cannot have that format.
    """
    options = recipe.optimizer
    if isinstance(options, BitsAndBytesOptions):
        return _bitsandbytes(options, trained)
    assert isinstance(options, AdamWOptions)
    formats = {
        i: StateFormat.of(
            p.name, torch.empty(0, dtype=p.dtype, device="meta"), options.state_dtype, options.master, False
        )
        for i, p in enumerate(trained)
    }
    numels = {i: parameter.numel for i, parameter in enumerate(trained)}
    store = recipe.choice("state_store")
    if store == "gpu":
        chunks = make_layout(numels, formats, None)
        return States([(trained[chunk.pieces[0].parameter].name, chunk.nbytes) for chunk in chunks])
    chunk_bytes = memory_chunk_bytes(numels, formats)
    if isinstance(recipe.state_store, SsdStore):
        path = recipe.state_store.path
        chunk_bytes = read_tuned(Path(path if isinstance(path, str) else path[0])).get("chunk_bytes", CHUNK_BYTES)
    chunks = make_layout(numels, formats, chunk_bytes)
    largest = max((chunk.nbytes for chunk in chunks), default=0)
    moved = sum(chunk.nbytes for chunk in chunks)
    device = [("", largest)] * DEPTH
    if store == "cpu":
        host = sum(whole_pages(chunk.nbytes) for chunk in chunks)
        return States(device, host=host, step_to_device=moved, step_chunks=len(chunks))
    stripes = 1 if isinstance(recipe.state_store.path, str) else len(recipe.state_store.path)
    slots, used = make_slots(chunks, stripes)
    slot = max((slot.length for slot in slots), default=0)
    buffers = min(int(recipe.state_store.pinned_gib * GIB) // max(slot, 1), len(chunks) + MIN_BUFFERS)
    written = sum(used)
    return States(
        device,
        host=(buffers + 1) * aligned(slot),
        disk=written * (1 + recipe.state_store.reserve_checkpoints),
        step_read=written,
        step_written=written,
        step_to_device=moved,
        step_chunks=len(chunks),
    )


def _bitsandbytes(options: BitsAndBytesOptions, trained: list[Trained]) -> States:
    """Two states a parameter: fp32, or one byte with a scale for a block; paged ones are managed memory."""
    in_8bit, paged = "8bit" in options.class_name, options.class_name.startswith("Paged")
    device, host = [], 0
    for parameter in trained:
        small = parameter.numel < BNB_MIN_8BIT
        state = parameter.numel * (1 if in_8bit and not small else 4)
        away = paged and parameter.numel >= BNB_MIN_PAGED
        host += 2 * state if away else 0
        device += [] if away else [(parameter.name, state)] * 2
        if in_8bit and not small:
            device += [(parameter.name, -(-parameter.numel // BNB_BLOCK) * 4)] * 2
    return States(device, host=host)
