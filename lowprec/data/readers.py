"""One generator for each kind of file: records in file order, each with the place it came from.

The standard library and PyArrow read the files here, because a message has to name the line or row of a bad record,
which ``datasets.load_dataset`` cannot tell (it casts whole tables). Storage, streams and hub data sets are
``datasets``' own work.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from lowprec.data.records import Record

Reader = Callable[[Path, str], Iterator[Record]]


def read_file(path: Path, name: str) -> Iterator[Record]:
    """Yield the records of one data file; ``name`` is how messages call it. A ``.gz`` file is read as what it holds."""
    kind = kind_of(path)
    assert kind is not None, f"{name} is not a data file"
    yield from READERS[kind](path, name)


def kind_of(path: Path) -> str | None:
    """The suffix by which a reader is chosen (``.jsonl`` of ``a.jsonl.gz``), or None for a file that is not data."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def _lines(path: Path) -> Iterator[tuple[int, str | None, str]]:
    """(number from 1, text or None, problem) of each line; the byte order mark of the first line is dropped."""
    with fsspec.open(str(path), "rb", compression="infer") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8"), ""
            except UnicodeDecodeError as error:
                yield number, None, f"{_not_utf8(error)}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"byte {error.start + 1} (0x{byte:02x}) is not UTF-8; convert the file, for instance by iconv -t UTF-8"


def _read_jsonl(path: Path, name: str) -> Iterator[Record]:
    for number, text, problem in _lines(path):
        where = f"{name}, line {number}"
        if text is None:
            yield Record(where=where, problem=problem)
        elif text.strip():
            yield _parsed(text, where)


def _parsed(text: str, where: str) -> Record:
    try:
        return _as_record(json.loads(text.rstrip("\r\n")), where)
    except json.JSONDecodeError as error:
        return Record(where=where, problem=f"invalid JSON at column {error.colno}: {error.msg}")


def _as_record(value: Any, where: str) -> Record:
    if isinstance(value, dict):
        return Record(where=where, fields=value)
    return Record(where=where, problem=f"a {type(value).__name__} stands where an object with named fields is expected")


def _read_json(path: Path, name: str) -> Iterator[Record]:
    """An array of objects, an object whose only list of objects is the data, or JSON lines under this suffix."""
    with fsspec.open(str(path), "rb", compression="infer") as file:
        raw = file.read()
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield Record(where=name, problem=_not_utf8(error))
        return
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip()[:1] == b"{":
            yield from _read_jsonl(path, name)
        else:
            yield Record(where=f"{name}, line {error.lineno}", problem=f"invalid JSON: {error.msg}")
        return
    if isinstance(document, dict):
        lists = [
            value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        is_one_record = any(key in document for key in ("messages", "conversations"))
        document = [document] if is_one_record or len(lists) != 1 else lists[0]
    if not isinstance(document, list):
        yield Record(where=name, problem="holds neither an array of objects nor an object with one such array")
        return
    for index, value in enumerate(document):
        yield _as_record(value, f"{name}, index {index}")


def _read_csv(path: Path, name: str) -> Iterator[Record]:
    """Rows count from 1 after the header; an empty cell, and one that a short row lacks, is an empty string."""
    import pandas as pd  # for CSV alone: it takes a sixth of a second

    separator = "\t" if kind_of(path) == ".tsv" else ","
    row = 0
    try:
        for chunk in pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, chunksize=1000, encoding="utf-8-sig"
        ):
            columns = [str(column) for column in chunk.columns]
            for values in chunk.itertuples(index=False, name=None):
                row += 1
                yield Record(where=f"{name}, row {row}", fields=dict(zip(columns, values, strict=True)))
    except pd.errors.EmptyDataError:
        return
    except pd.errors.ParserError as error:
        line = re.search(r"line (\d+)", str(error))
        where = f"{name}, line {line.group(1)}" if line else f"{name}, after row {row}"
        yield Record(where=where, problem=f"invalid CSV: {' '.join(str(error).split())}")
    except UnicodeDecodeError:
        for number, text, problem in _lines(path):
            if text is None:
                yield Record(where=f"{name}, line {number}", problem=problem)


def _read_parquet(path: Path, name: str) -> Iterator[Record]:
    try:
        row = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1000):
            for fields in batch.to_pylist():
                row += 1
                yield Record(where=f"{name}, row {row}", fields=fields)
    except (pa.ArrowInvalid, OSError) as error:
        yield Record(where=name, problem=f"cannot be read as Parquet: {' '.join(str(error).split())}")


def _read_text(path: Path, name: str) -> Iterator[Record]:
    """A sample is a paragraph: the lines between blank lines. It is named by its first line."""
    paragraph: list[str] = []
    first = 0
    for number, text, problem in _lines(path):
        if text is None:
            yield Record(where=f"{name}, line {number}", problem=problem)
        elif text.strip():
            first = first if paragraph else number
            paragraph.append(text.rstrip("\r\n"))
        elif paragraph:
            yield Record(where=f"{name}, line {first}", fields={"text": "\n".join(paragraph)})
            paragraph = []
    if paragraph:
        yield Record(where=f"{name}, line {first}", fields={"text": "\n".join(paragraph)})


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
