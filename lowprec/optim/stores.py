"""``state_store`` by name: the one place that knows all stores."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowprec.errors import UserError
from lowprec.optim.disk import Disk, HostMemory, whole_pages
from lowprec.optim.format import StateFormat
from lowprec.optim.layout import Chunk, make_layout
from lowprec.optim.memory_store import MemoryStore
from lowprec.optim.ssd_store import SsdStore
from lowprec.optim.staged_store import StagedStore
from lowprec.optim.store import StateStore

STATE_STORES = ("gpu", "cpu", "ssd")
CHUNK_BYTES = 8 << 20
"""Of the ssd store, where ``lowprec bench ssd`` has found nothing better."""
SMALLEST_CHUNK, LARGEST_CHUNK, CHUNKS = 1 << 20, 32 << 20, 64
"""Of states in host memory. The GPU holds four chunks (staged_store.py), which need not be a third of small states; and
for a chunk the host takes 0.4 ms, in which PCIe moves 20 MiB: a step of a 1B model took 500 to 740 ms on an H100 by
chunks of 8 MiB, and 358 by 32."""
THREADS = 8
TUNED_FILE = "lowprec-tuned.json"


def open_store(
    state_store: str,
    path: str | Path | Sequence[str | Path] | None,
    names: Sequence[str],
    params: Sequence[Tensor],
    formats: dict[int, StateFormat],
    devices: dict[int, torch.device],
    *,
    chunk_bytes: int | None = None,
    threads: int | None = None,
    pinned_gib: float = 2.0,
    reserve_checkpoints: int = 1,
    disk: Disk | None = None,
) -> StateStore:
    """The store of the parameters numbered in ``formats``, which are updated on ``devices``.

    Args:
        chunk_bytes: bytes of a transfer of the cpu and ssd stores. By default ``memory_chunk_bytes`` (cpu), or what
            ``lowprec bench ssd`` found best for ``path``, or else 8 MiB.
        threads: reads at a time, and as many writes (ssd). By default as ``chunk_bytes``, or else 8.
        pinned_gib: the most host memory for the buffers of the ssd store, GiB.
        reserve_checkpoints: checkpoints on the disk of ``path`` whose space the ssd store reserves at the start.
        disk: the system calls of the ssd store.

    Raises:
        UserError: the choice cannot be had.
    """
    if state_store not in STATE_STORES:
        raise UserError(f"state_store={state_store!r} is unknown: choose one of {', '.join(STATE_STORES)}.")
    if (path is None) == (state_store == "ssd"):
        remedy = (
            "set state_store.path to a folder on the disk" if path is None else "remove state_store.path, or choose ssd"
        )
        raise UserError(f"state_store={state_store} {'needs a path' if path is None else 'keeps no files'}: {remedy}.")
    numels = {i: params[i].numel() for i in formats}
    if state_store == "gpu":
        if any(devices[i] != params[i].device for i in formats):
            raise UserError(
                "state_store=gpu keeps states beside the weights, and update_on='cpu' asks for updates in host memory: "
                "choose state_store=cpu or ssd, or update_on='weights'."
            )

        def beside(chunk: Chunk) -> Tensor:
            return torch.empty(chunk.nbytes, dtype=torch.uint8, device=params[chunk.pieces[0].parameter].device)

        return MemoryStore(make_layout(numels, formats, None), params, beside)
    if len(set(devices.values())) > 1:
        places = ", ".join(sorted(map(str, set(devices.values()))))
        raise UserError(
            f"state_store={state_store} streams to one device, but the weights are on {places}: choose gpu."
        )
    device = next(iter(devices.values()), torch.device("cpu"))
    paths = [] if path is None else [Path(p) for p in ([path] if isinstance(path, str | Path) else path)]
    tuned = read_tuned(paths[0]) if paths else {}
    default = memory_chunk_bytes(numels, formats) if state_store == "cpu" else CHUNK_BYTES
    chunk_bytes = chunk_bytes or tuned.get("chunk_bytes", default)
    chunks = make_layout(numels, formats, chunk_bytes)
    host: StateStore
    if state_store == "cpu":
        memory = HostMemory(sum(whole_pages(chunk.nbytes) for chunk in chunks), pin=device.type == "cuda")
        host = MemoryStore(chunks, params, lambda chunk: memory.take(chunk.nbytes), memory)
    else:
        host = SsdStore(
            chunks,
            names,
            params,
            paths,
            chunk_bytes=chunk_bytes,
            pinned_gib=pinned_gib,
            reserve_checkpoints=reserve_checkpoints,
            threads=threads or tuned.get("threads", THREADS),
            pin=device.type == "cuda",
            disk=disk,
        )
    return StagedStore(host, device) if device.type == "cuda" else host


def memory_chunk_bytes(numels: dict[int, int], formats: dict[int, StateFormat]) -> int:
    """Bytes of a chunk of the cpu store: a 64th of all states, at least 1 and at most 32 MiB."""
    nbytes = sum(formats[i].nbytes(numel) for i, numel in numels.items())
    return min(max(nbytes // CHUNKS, SMALLEST_CHUNK), LARGEST_CHUNK)


def read_tuned(path: Path) -> dict[str, int]:
    """What ``lowprec bench ssd`` kept for this path: ``chunk_bytes`` and ``threads``; empty where it never ran.

    Raises UserError where the file is damaged.
    """
    file = path / TUNED_FILE
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text())
        return {name: int(kept[name]) for name in ("chunk_bytes", "threads")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error!r}): remove it, or measure the disk again by `lowprec bench ssd --path {path}`."
        ) from None
