"""One run at a time on a path: a lock that dies with its process, and the leftovers of dead runs."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Self

from lowprec.errors import UserError

LOCK_FILE = "lowprec.lock"
PREFIX = "lowprec-states-"


class PathLock:
    """Holds ``path``, made where missing, until ``release``, or until the process ends in whatever way (flock)."""

    def __init__(self, path: Path):
        """Raises UserError where a live run holds the path, or where it can be no folder to write to."""
        self._file = path / LOCK_FILE
        while True:
            try:
                path.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise UserError(
                    f"state_store.path={path} cannot be used ({error.strerror}): choose a folder on the disk that you "
                    "may write to."
                ) from error
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                raise UserError(
                    f"state_store.path={path} is in use by {_holder(self._file)}: wait for that run, or choose "
                    "another folder."
                ) from None
            if self._is_current():
                break
            os.close(self._descriptor)  # the holder before us took the file away between our open and our lock
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(owner | {"folder": str(Path.cwd())}).encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _is_current(self) -> bool:
        try:
            return os.fstat(self._descriptor).st_ino == self._file.stat().st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        self._file.unlink(missing_ok=True)
        os.close(self._descriptor)


def _holder(file: Path) -> str:
    try:
        owner = json.loads(file.read_text())
        return f"process {owner['pid']} on {owner['host']}, running in {owner['folder']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process, which is starting or ending"


def leftovers(path: Path) -> list[Path]:
    """The state files in a path; those of a dead run once the path is locked."""
    return sorted(path.glob(f"{PREFIX}*.bin")) + sorted(path.glob("lowprec-probe-*"))


def clean(path: str | Path) -> dict[str, int]:
    """Remove what dead runs left in ``path``: name -> bytes that this frees.

    Checkpoints elsewhere keep their links to these files, and so their states; their share counts as 0 bytes. Raises
    UserError where a live run holds the path.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give the state_store.path of a run.")
    with PathLock(path):
        removed = {}
        for file in leftovers(path):
            status = file.stat()
            removed[file.name] = status.st_blocks * 512 if status.st_nlink == 1 else 0
            file.unlink()
        return removed
