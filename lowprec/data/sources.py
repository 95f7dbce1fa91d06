"""What ``data.path`` stands for: a file, a folder of files, a hub data set, or ``python_docs``."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowprec.data import python_docs
from lowprec.data.options import Data
from lowprec.data.readers import READERS, kind_of, read_file
from lowprec.data.records import Record
from lowprec.errors import UserError

if TYPE_CHECKING:
    import datasets  # imported where it is called: it takes a third of a second, and plans read no data

_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


class Source(Protocol):
    """Records in a fixed order. ``name`` is how the report calls it."""

    name: str

    def records(self) -> Iterator[Record]:
        """Read from the beginning."""
        ...

    def fingerprint(self) -> str:
        """A text that changes when a record does."""
        ...

    def stream(self) -> "datasets.IterableDataset":
        """The records as an iterable data set of :class:`Record` fields, resumable by its ``state_dict``."""
        ...


@dataclass(slots=True)
class FileSource:
    """Files in the order of their paths; ``root`` is cut off their names in messages."""

    name: str
    root: Path
    files: list[Path]

    def records(self) -> Iterator[Record]:
        return _read_files(self.files, self.root)

    def fingerprint(self) -> str:
        digests = []
        for path in self.files:
            with path.open("rb") as file:
                digests.append(f"{path.relative_to(self.root)}:{hashlib.file_digest(file, 'sha256').hexdigest()}")
        return "\n".join(digests)

    def stream(self) -> "datasets.IterableDataset":
        import datasets

        return datasets.IterableDataset.from_generator(
            _file_rows, gen_kwargs={"files": list(self.files), "root": self.root}
        )


@dataclass(slots=True)
class PythonDocs:
    """The built-in data set, made once."""

    name: str = python_docs.NAME
    _made: list[Record] = field(default_factory=list, repr=False)

    def records(self) -> Iterator[Record]:
        if not self._made:
            self._made = list(python_docs.python_docs())
        return iter(self._made)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for record in self.records():
            digest.update(repr((record.fields, record.split_key)).encode())
        return digest.hexdigest()

    def stream(self) -> "datasets.IterableDataset":
        import datasets

        return datasets.IterableDataset.from_generator(_python_docs_rows)


@dataclass(slots=True)
class HubSource:
    """A data set of the hub, or a folder written by ``Dataset.save_to_disk``."""

    name: str
    dataset: Any = field(repr=False)

    def records(self) -> Iterator[Record]:
        for row, fields in enumerate(self.dataset, 1):
            yield Record(where=f"{self.name}, row {row}", fields=fields)

    def fingerprint(self) -> str:
        return f"{self.name}:{self.dataset._fingerprint}"

    def stream(self) -> "datasets.IterableDataset":
        import datasets

        dataset = self.dataset
        if isinstance(dataset, datasets.Dataset):
            dataset = dataset.to_iterable_dataset()
        return dataset.map(
            _hub_row, fn_kwargs={"name": self.name}, with_indices=True, remove_columns=dataset.column_names
        )


# Files that lie beside data and describe them.
_NOT_DATA = {"readme", "license", "licence", "notice", "citation", "changelog", "requirements"}
_NOT_DATA |= {"dataset_info", "dataset_infos", "dataset_dict", "metadata"}


def open_source(path: str, options: Data, *, key: str = "data.path") -> Source:
    """Find what ``path`` names.

    Args:
        path: ``python_docs``, a file, a folder or a hub name.
        options: ``split``, ``subset``, ``revision`` and ``streaming`` are used.
        key: The recipe's key that holds ``path``, for messages.

    Raises:
        UserError: nothing is there, the folder holds no data, or the hub cannot be reached.
    """
    if path == python_docs.NAME:
        return PythonDocs()
    local = Path(path).expanduser()
    if local.is_file():
        return FileSource(path, local.parent, [_readable(local, key)])
    if local.is_dir():
        if any((local / name).exists() for name in ("state.json", "dataset_dict.json")):
            return HubSource(path, _load_saved(local, options.split, key))
        return FileSource(path, local, _files_of(local, options.split, key))
    looks_local = local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or kind_of(local)
    if looks_local:
        raise UserError(f"{key}={path}: there is no such file or folder (looked in {Path.cwd()}).")
    return HubSource(path, _load_from_hub(path, options, key))


def first_records(source: Source, limit: int | None) -> Iterator[Record]:
    """The records, at most ``limit`` of them."""
    return islice(source.records(), limit)


def _readable(path: Path, key: str) -> Path:
    if kind_of(path) is None:
        raise UserError(f"{key}={path}: {path.suffix or 'no'} suffix; data files end in {_known_suffixes()}.")
    return path


def _known_suffixes() -> str:
    return ", ".join(READERS) + " (also with .gz)"


def _files_of(folder: Path, split: str, key: str) -> list[Path]:
    """All data files below a folder; where file or folder names tell splits, those of ``split`` alone."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and kind_of(path)
        and path.name.partition(".")[0].lower() not in _NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(f"{key}={folder}: the folder holds no data file ({_known_suffixes()}).")
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if not any(splits.values()):
        return files
    wanted = [path for path in files if splits[path] == _SPLITS.get(split, split)]
    if not wanted:
        named = ", ".join(sorted({name for name in splits.values() if name}))
        raise UserError(f"{key}={folder}: its file names tell the splits {named}, not data.split={split}.")
    return wanted


def _split_of(path: Path) -> str | None:
    """The split that a path names, as in ``train-00000-of-00002.parquet`` or ``validation/part1.jsonl``."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _load_saved(folder: Path, split: str, key: str) -> "datasets.Dataset":
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={folder}: a saved data set that cannot be loaded: {error}.") from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise UserError(f"{key}={folder}: there is no data.split={split}; it has {', '.join(saved)}.")
    return saved[split]


def _load_from_hub(path: str, options: Data, key: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            path, options.subset, split=options.split, revision=options.revision, streaming=options.streaming
        )
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"{key}={path}: no such file or folder here, and no such data set on the hub ({error})."
        ) from error
    except OSError as error:  # ConnectionError, OfflineModeIsEnabled, timeouts
        raise UserError(
            f"{key}={path}: no such file or folder here, and the hub cannot be reached ({type(error).__name__}). "
            "Without a network, set data.path to a file (JSONL, JSON, CSV, Parquet, text), a folder of them, or "
            "python_docs."
        ) from error
    except ValueError as error:  # unknown subset or split, with the choices in the text
        raise UserError(f"{key}={path}: {error} (see data.subset and data.split).") from error


def _read_files(files: list[Path], root: Path) -> Iterator[Record]:
    for path in files:
        yield from read_file(path, str(path.relative_to(root)))


def _as_row(record: Record) -> dict[str, Any]:
    return {"where": record.where, "fields": record.fields, "problem": record.problem, "split_key": record.split_key}


def _file_rows(files: list[Path], root: Path) -> Iterator[dict[str, Any]]:
    return map(_as_row, _read_files(files, root))


def _python_docs_rows() -> Iterator[dict[str, Any]]:
    return map(_as_row, python_docs.python_docs())


def _hub_row(fields: dict[str, Any], index: int, name: str) -> dict[str, Any]:
    return _as_row(Record(where=f"{name}, row {index + 1}", fields=dict(fields)))
