"""Tokenised data on disk, found by the hash of everything that decides them.

An entry is a folder that is whole or absent (:mod:`lowprec.checkpoint`), so that what a killed process leaves is never
read. A lock lets one process prepare while the others (``accelerate launch``) wait for it.
"""

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from lowprec.checkpoint import atomic_folder, damage
from lowprec.errors import UserError


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
    remedy = "Set data.cache_dir to a folder with room."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            if damage(entry) is not None:
                with atomic_folder(entry, keeps=remedy) as writing:
                    build(writing)
    except OSError as error:
        path = Path(error.filename).absolute() if isinstance(error.filename, str) else folder.absolute()
        if not (path.is_relative_to(folder.absolute()) or folder.absolute().is_relative_to(path)):
            raise  # of the data, which ``build`` reads
        raise UserError(f"The cache of tokenised data, {folder}, cannot be written ({error}). {remedy}") from error
    return entry
