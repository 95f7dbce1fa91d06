"""Files of fixed slots on a disk: past the page cache where the file system allows it, and never a short transfer."""

import errno
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowprec.errors import UserError

# Offset, length and memory of every transfer are multiples of this. O_DIRECT asks for 512 B to 4 KiB on local disks and
# for a page, at most 64 KiB, on some network file systems.
ALIGNMENT = 65536
GIB = 1 << 30


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


class Disk:
    """The system calls that the store makes; tests put faults in their place."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        os.posix_fallocate(descriptor, 0, nbytes)

    def read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [buffer], offset)

    def write(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        return os.pwritev(descriptor, [buffer], offset)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def free(self, folder: Path) -> int:
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize


def direct_refusal(disk: Disk, folder: Path) -> str | None:
    """Why files in ``folder`` cannot be read and written with O_DIRECT, or None: found by writing and reading one."""
    if not hasattr(os, "O_DIRECT"):
        return "this system has no O_DIRECT"
    path = folder / f"lowprec-probe-{os.getpid()}"
    buffer = memoryview(mmap.mmap(-1, ALIGNMENT))
    try:
        descriptor = disk.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            if disk.write(descriptor, buffer, 0) != ALIGNMENT or disk.read(descriptor, buffer, 0) != ALIGNMENT:
                return "a transfer was cut short"
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return f"the file system refuses it ({error.strerror})"
    finally:
        path.unlink(missing_ok=True)
    return None


class SlotFile:
    """One open file of slots. Any thread may read and write, each slot by one of them at a time."""

    def __init__(self, disk: Disk, path: Path, direct: bool, nbytes: int | None = None):
        """Open ``path`` to be read; with ``nbytes``, make it that long, its space reserved, to be written as well."""
        self.path = path
        self._disk = disk
        self._direct = direct
        flags = os.O_RDONLY if nbytes is None else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._descriptor = disk.open(path, flags | (os.O_DIRECT if direct else 0))
        if nbytes is not None:
            try:
                disk.allocate(self._descriptor, nbytes)
            except OSError:
                self.remove()
                raise

    def read(self, buffer: memoryview, offset: int) -> None:
        self._whole("read", self._disk.read(self._descriptor, buffer, offset), buffer, offset)

    def write(self, buffer: memoryview, offset: int) -> None:
        self._whole("write", self._disk.write(self._descriptor, buffer, offset), buffer, offset)
        if not self._direct:
            os.posix_fadvise(self._descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def _whole(self, what: str, count: int, buffer: memoryview, offset: int) -> None:
        if count != len(buffer):
            raise OSError(errno.EIO, f"short {what}: {count} of {len(buffer)} bytes at {offset}", str(self.path))

    def sync(self) -> None:
        self._disk.sync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def remove(self) -> None:
        """Close the file and take its name away; links elsewhere keep its contents."""
        self.close()
        self.path.unlink(missing_ok=True)


def reserve(
    disk: Disk, paths: Sequence[Path], nbytes: Sequence[int], direct: Sequence[bool], remedy: str
) -> list[SlotFile]:
    """New files of the given lengths, their space reserved. Raises UserError, leaving none, where a disk is full."""
    files: list[SlotFile] = []
    for path, length, is_direct in zip(paths, nbytes, direct, strict=True):
        try:
            files.append(SlotFile(disk, path, is_direct, length))
        except OSError as error:
            for file in files:
                file.remove()
            free = disk.free(path.parent) / GIB
            raise UserError(
                f"state_store.path={path.parent}: cannot reserve {length / GIB:.2f} GiB for the optimizer's states, "
                f"{free:.2f} GiB are free ({error.strerror}). {remedy}"
            ) from error
    return files


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a uint8 CPU tensor, for system calls."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # an array is a buffer


class HostMemory:
    """Page-aligned host memory, pinned where CUDA will copy from it; taken piece by piece.

    Exactly as large as asked: torch's pinned allocator rounds up to a power of two. ``remedy``: what a user whose
    system refuses to pin as much should do.
    """

    def __init__(self, nbytes: int, pin: bool, remedy: str = ""):
        self.tensor = torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)
        self._used = 0
        self.close: Callable[[], object] = lambda: None
        if pin:
            code = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self.tensor.numel(), 0))
            if code:
                raise UserError(
                    f"The system refuses to pin {nbytes / GIB:.2f} GiB of host memory (CUDA error {code}): "
                    f"{remedy + ', or ' if remedy else ''}raise the limit (ulimit -l)."
                )
            # Also where nobody calls close: memory that is freed while pinned could never be pinned again.
            self.close = weakref.finalize(self, _unpin, self.tensor.data_ptr())

    def take(self, nbytes: int) -> Tensor:
        """The next ``nbytes``, on a page of their own."""
        start, self._used = self._used, self._used + whole_pages(nbytes)
        assert self._used <= self.tensor.numel(), "host memory was sized for all that is taken from it"
        return self.tensor[start : start + nbytes]


def _unpin(pointer: int) -> None:
    try:
        torch.cuda.synchronize()  # no copy may be under way
    finally:  # where a stream is being captured, waiting is refused
        torch.cuda.cudart().cudaHostUnregister(pointer)
