"""What a reader hands on: one record of the data with the place it came from."""

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True, slots=True)
class Record:
    """One record as read, or the reason why it could not be read."""

    where: str
    """The file and the line (JSONL, text), row (CSV, Parquet, hub) or index (JSON), as an error message names it."""
    fields: dict[str, Any] | None = None
    problem: str | None = None
    split_key: str | None = None
    """Records with equal keys stay on one side of the split; without a key the content decides."""


class RecordError(ValueError):
    """A record that cannot be used: ``field`` (dotted path or empty) and what is wrong with it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field}: {problem}" if field else problem)
