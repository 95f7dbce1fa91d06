"""The disk of the run folder: writable, roomy, past the page cache, and how fast."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lowprec.bench import ssd
from lowprec.doctor.check import Check, attempt
from lowprec.optim.disk import Disk, direct_refusal

GROUP = "disk"
GIB = 2**30
LEAST_FREE_GIB = 1.0
"""An adapter with its checkpoints and the data cache."""


def check_disk(quick: bool) -> Iterator[Check]:
    """Of the folder that runs are written to: ``runs``, or where there is none yet, the current one."""
    folder = Path("runs") if Path("runs").is_dir() else Path()
    elsewhere = "Change to a folder that you may write to, or set train.output_dir."
    yield attempt(GROUP, "run folder", lambda: _writable(folder), remedy=elsewhere, required=True)
    yield attempt(
        GROUP,
        "free space",
        lambda: _free(folder),
        remedy="Free some, or set train.output_dir to another disk.",
        required=True,
    )
    yield attempt(
        GROUP,
        "O_DIRECT",
        lambda: _direct(folder),
        remedy="state_store=ssd goes through the page cache here; set state_store.path to a folder on a local disk.",
    )
    if not quick:
        yield attempt(GROUP, "speed", lambda: _speed(folder), remedy="It needs 0.25 GiB for a moment.")


def _writable(folder: Path) -> str:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"0")
        file.flush()
        os.fsync(file.fileno())
    return f"{folder.resolve()} can be written"


def _free(folder: Path) -> str:
    free = shutil.disk_usage(folder).free / GIB
    if free < LEAST_FREE_GIB:
        raise RuntimeError(f"{free:.2f} GiB are free, and checkpoints and caches need {LEAST_FREE_GIB:g} at least")
    return f"{free:.1f} GiB"


def _direct(folder: Path) -> str:
    refusal = direct_refusal(Disk(), folder)
    if refusal is not None:
        raise RuntimeError(refusal)
    return "transfers go past the page cache"


def _speed(folder: Path) -> str:
    rate, direct = ssd.quick(folder, seconds=1.5, size_gib=0.25)
    how = "" if direct else ", through the page cache"
    return (
        f"read {rate.read_gb_s:.2f}, write {rate.write_gb_s:.2f}, both at once {rate.mixed_gb_s:.2f} GB/s in half a "
        f"second each{how}"
    )
