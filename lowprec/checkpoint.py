"""Folders that are whole or absent: checkpoints and ``final/``.

A folder is written under a temporary name, every file is flushed to the disk, a manifest with sizes and checksums
comes last, and one rename makes it visible. Whatever moment the process dies at, the folders with a manifest are whole.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowprec.errors import UserError

MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"
_REPLACED = f"{_TEMPORARY}replaced-"


@contextmanager
def atomic_folder(
    target: Path, *, needed_bytes: int = 0, keeps: str = "", self_checked: str | None = None
) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``; on leaving, seal it with a manifest and rename it to ``target``.

    Args:
        target: the folder to appear. One that exists is replaced.
        needed_bytes: what will be written, checked against the free space before and named where it runs out.
        keeps: what stays usable if writing fails, for the message.
        self_checked: a pattern of paths whose format carries checksums that every reader verifies; the manifest holds
            their sizes alone, since reading tens of gigabytes once more would only repeat that.

    Raises:
        UserError: the disk is full, before or while writing; the temporary folder is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target, needed_bytes, keeps)
    writing = target.parent / f"{_TEMPORARY}{target.name}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    try:
        yield writing
        _seal(writing, self_checked)
    except BaseException as error:
        written = sum(file.stat().st_size for file in writing.rglob("*") if file.is_file())
        shutil.rmtree(writing, ignore_errors=True)
        if is_disk_full(error):
            raise UserError(_disk_full(target, needed_bytes - written, keeps)) from error
        raise
    if target.exists():
        # A rename cannot replace a folder that holds files; the old one steps aside first.
        replaced = target.parent / f"{_REPLACED}{target.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        writing.rename(target)
        shutil.rmtree(replaced)
    else:
        writing.rename(target)
    _fsync(target.parent)


def remove_unfinished(parent: Path) -> None:
    """Remove what a killed process was writing; a folder that had stepped aside for another one comes back."""
    for leftover in parent.glob(f"{_TEMPORARY}*"):
        aside = leftover.name.startswith(_REPLACED) and parent / leftover.name.removeprefix(_REPLACED)
        if aside and not aside.exists():
            leftover.rename(aside)
        else:
            shutil.rmtree(leftover)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in words; None where every file has its size and checksum."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / MANIFEST} is missing or unreadable ({type(error).__name__})"
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}"
        if "sha256" in expected and _sha256(file) != expected["sha256"]:
            return f"{file} does not have the checksum of its manifest"
    return None


def checkpoints(parent: Path) -> list[Path]:
    """The ``step-N`` folders, oldest first, whole or not."""
    found = [folder for folder in parent.glob("step-*") if folder.name[5:].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The N of ``step-N``."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_whole(parent: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and what is wrong with those newer than it."""
    complaints: list[str] = []
    for folder in reversed(checkpoints(parent)):
        wrong = damage(folder)
        if wrong is None:
            return folder, complaints
        complaints.append(wrong)
    return None, complaints


def prune(saved: Path, keep: int | None) -> None:
    """Of the checkpoints up to the one just saved, remove all but the newest ``keep``. Those of later steps are damaged
    ones that a resumed run has passed over: they count as none, and make place when their step comes again."""
    if keep is not None:
        for folder in [other for other in checkpoints(saved.parent) if step_of(other) <= step_of(saved)][:-keep]:
            shutil.rmtree(folder)


def _seal(folder: Path, self_checked: str | None) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries: dict[str, dict[str, int | str]] = {}
    for file in files:
        entry = entries[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size}
        if self_checked is None or not file.match(self_checked):
            entry["sha256"] = _sha256(file)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1))
    for file in [*files, manifest]:
        file.chmod(manifest.stat().st_mode)  # safetensors writes files that their owner alone may read
        _fsync(file)
    for directory in {folder, *(file.parent for file in files)}:
        _fsync(directory)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(target: Path, needed_bytes: int, keeps: str) -> None:
    """Raises UserError where the disk of ``target`` has less room, and says what stays usable (``keeps``)."""
    missing = needed_bytes - shutil.disk_usage(target.parent).free
    if missing > 0:
        raise UserError(_disk_full(target, missing, keeps))


def _disk_full(target: Path, missing: int, keeps: str) -> str:
    kept = f" {keeps}" if keeps else ""
    more = f"at least {missing:,} bytes more" if missing > 0 else "more room"
    return f"The disk is full: {target} needs {more} on {target.parent}.{kept}"


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is used up."""
    # safetensors wraps the operating system's error into one of its own and keeps only the text.
    text = str(error).lower()
    return (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text or "os error 122" in text
    )
