"""Tokenised data on disk, found by the hash of everything that decides them.

An entry is a folder that is written under another name and renamed when it is whole, so that what a killed process
leaves is never read. A lock lets one process prepare while the others (``accelerate launch``) wait for it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from lowprec.errors import UserError

MANIFEST = "manifest.json"


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lowprec``, or ``~/.cache/lowprec``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec"


def cache_key(**parts: Any) -> str:
    """40 hex digits of the parts, of this package's source and of the libraries that read and tokenise."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    parts["code"] = hashlib.sha256(b"".join(sources)).hexdigest()
    parts["libraries"] = {
        name: version(name) for name in ("transformers", "tokenizers", "datasets", "pandas", "pyarrow")
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of vocabulary, merges, added tokens and template; not of padding or truncation, which are not used."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("padding", None)
    backend.pop("truncation", None)
    whole = [
        backend,
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def cached(folder: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of an entry, built where it is missing or damaged.

    Args:
        folder: The cache, created if need be.
        key: Of :func:`cache_key`.
        build: Writes the entry's files into the empty folder that it is given.

    Raises:
        UserError: the cache cannot be written.
    """
    entry = folder / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            if not _is_whole(entry):
                _build_entry(folder, entry, build)
    except OSError as error:
        raise UserError(
            f"the cache of tokenised data, {folder}, cannot be written ({error}); "
            "set data.cache_dir to a folder with room."
        ) from error
    return entry


def _build_entry(folder: Path, entry: Path, build: Callable[[Path], None]) -> None:
    for left_over in folder.glob(f".{entry.name}-*"):  # of a killed process: we hold the lock, so nobody writes there
        shutil.rmtree(left_over, ignore_errors=True)
    writing = Path(mkdtemp(prefix=f".{entry.name}-", dir=folder))
    try:
        build(writing)
        _write_manifest(writing)
        shutil.rmtree(entry, ignore_errors=True)
        writing.rename(entry)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(files, file)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(entry: Path) -> bool:
    """Whether every file is there with its size and checksum."""
    try:
        files = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        return all(
            (entry / name).stat().st_size == told["bytes"] and _sha256(entry / name) == told["sha256"]
            for name, told in files.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
