"""Versions of the states on disk, and the checkpoints that keep one.

A version is one file for each path, all of the same slots. A step overwrites the live version in place. A checkpoint
links the live version's files into its own folder (the same blocks under a second name, so nothing is copied), and the
next writes go to a new version: whatever happens to it, the checkpoint's blocks are written by nobody. Where no link
can be made, the slots are copied. So a run that is killed goes on from its last checkpoint, and never from torn states.
"""

import mmap
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.errors import UserError
from lowprec.optim.disk import ALIGNMENT, GIB, Disk, SlotFile, aligned, reserve
from lowprec.optim.layout import Chunk
from lowprec.optim.path_lock import PREFIX
from lowprec.optim.states_io import sync_file, sync_folder


@dataclass(frozen=True)
class Slot:
    """Where a chunk lies in every version: which path's file, and where in it."""

    stripe: int
    offset: int
    length: int


def make_slots(chunks: Sequence[Chunk], num_stripes: int) -> tuple[list[Slot], list[int]]:
    """Deal the chunks out to the stripes in turn; returns the slots and each stripe's bytes."""
    slots, used = [], [0] * num_stripes
    for chunk in chunks:
        stripe, length = chunk.index % num_stripes, aligned(chunk.nbytes)
        slots.append(Slot(stripe, used[stripe], length))
        used[stripe] += length
    return slots, used


class Version:
    """The files of one version, one for each stripe; ``chunks`` counts the chunks whose newest states it holds."""

    def __init__(self, files: list[SlotFile], owned: bool):
        self.files = files
        self.owned = owned  # made by this run in its path; otherwise a checkpoint's, only read
        self.chunks = 0

    @classmethod
    def create(
        cls, disk: Disk, number: int, folders: Sequence[Path], nbytes: Sequence[int], direct: Sequence[bool]
    ) -> "Version":
        paths = [folder / f"{PREFIX}{number:06d}-{stripe}.bin" for stripe, folder in enumerate(folders)]
        remedy = (
            "Free some space or choose another path. Each checkpoint on this disk takes as much again; "
            "state_store.reserve_checkpoints=0 reserves nothing for them."
        )
        files = reserve(disk, paths, nbytes, direct, remedy)
        for folder in folders:
            sync_folder(folder)
        return cls(files, owned=True)

    def sync(self) -> None:
        for file in self.files:
            file.sync()

    def drop(self) -> None:
        for file in self.files:
            if self.owned:
                file.remove()
            else:
                file.close()


@dataclass(frozen=True)
class Record:
    """Where the newest states of a chunk are, and their checksum."""

    version: Version
    slot: Slot
    checksum: int

    def read(self, buffer: memoryview) -> None:
        """Read the slot into ``buffer``; nothing in it is to be used before ``check``."""
        self.version.files[self.slot.stripe].read(buffer[: self.slot.length], self.slot.offset)

    def check(self, buffer: memoryview, describe: str) -> None:
        """Raises UserError that names the file and ``describe``, chunk and parameters, where the slot is damaged."""
        found = checksum(buffer[: self.slot.length])
        if found != self.checksum:
            raise UserError(
                f"{self.version.files[self.slot.stripe].path} is damaged at byte {self.slot.offset} ({describe}): its "
                f"checksum is {found:08x} and should be {self.checksum:08x}. The disk returned other bytes than were "
                "written: check it, and resume from a checkpoint."
            )


def checksum(buffer: memoryview) -> int:
    """CRC-32: finds every flipped bit and runs in many threads at once (2.2 GB/s a core; xxh3 is faster but not in
    parallel, because its binding holds the interpreter's lock)."""
    return zlib.crc32(buffer)


def keep(disk: Disk, records: Sequence[Record | None], folder: Path) -> tuple[dict[str, Any], bool]:
    """Put the files that hold ``records`` (None: no states yet) into ``folder``.

    Returns what ``SavedVersions`` needs, and whether a link was made, after which those files must not be written.
    """
    names: list[str] = []
    first: dict[int, int] = {}
    linked = False
    for version in {id(r.version): r.version for r in records if r is not None}.values():
        first[id(version)] = len(names)
        for file in version.files:
            names.append(f"states-{len(names):03d}.bin")
            linked |= _link_or_copy(disk, file.path, folder / names[-1])
    sync_folder(folder)
    chunks = [
        None if r is None else [first[id(r.version)] + r.slot.stripe, r.slot.offset, r.slot.length, r.checksum]
        for r in records
    ]
    return {"files": names, "chunks": chunks}, linked


def _link_or_copy(disk: Disk, source: Path, target: Path) -> bool:
    target.unlink(missing_ok=True)
    try:
        disk.link(source, target)
        return True
    except OSError:  # another file system, or one without hard links: the copy below reports what else may be wrong
        pass
    needed, free = source.stat().st_size, disk.free(target.parent)
    if needed > free:
        raise UserError(
            f"The checkpoint {target.parent} lies on another file system than state_store.path, so the states must be "
            f"copied: {needed / GIB:.2f} GiB, but {free / GIB:.2f} GiB are free there. Free some space, or put "
            "train.output_dir on the disk of state_store.path, where nothing is copied."
        )
    shutil.copyfile(source, target)
    sync_file(target)
    return False


def open_kept(disk: Disk, folder: Path, manifest: dict[str, Any]) -> list[Record | None]:
    """The records that ``keep`` put into a checkpoint, its files opened to be read, with O_DIRECT where it works."""
    version = Version([_open_file(disk, folder / name) for name in manifest["files"]], owned=False)
    return [
        None if entry is None else Record(version, Slot(entry[0], entry[1], entry[2]), entry[3])
        for entry in manifest["chunks"]
    ]


def _open_file(disk: Disk, path: Path) -> SlotFile:
    try:
        direct = SlotFile(disk, path, direct=True)
        try:
            direct.read(memoryview(mmap.mmap(-1, ALIGNMENT)), 0)
            return direct
        except OSError:
            direct.close()
    except FileNotFoundError:
        raise UserError(f"{path} is missing, which holds optimizer states: resume from another checkpoint.") from None
    except OSError:  # a file system without O_DIRECT
        pass
    return SlotFile(disk, path, direct=False)
