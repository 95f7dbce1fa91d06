"""The built-in data set: several thousand plain pairs, the same every time, without near twins over the split."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from lowprec.data.python_docs import python_docs
from lowprec.data.records import Record
from lowprec.data.split import held_out


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(python_docs())


def test_pairs(records: list[Record]) -> None:
    pairs = {record.where: record.fields for record in records}
    assert len(pairs) == len(records) > 3000
    assert len({fields["completion"] for fields in pairs.values() if fields}) == len(records)
    dedent = pairs["python_docs, textwrap.dedent"]
    assert dedent and dedent["prompt"].endswith(("`textwrap.dedent(text)` do?", "`textwrap.dedent(text)`.", "for?"))
    assert dedent["completion"].startswith("Remove any common leading whitespace from every line in `text`.")
    arguments = pairs["python_docs, textwrap.shorten, arguments"]
    assert arguments and "`width`" in arguments["completion"]


def test_nothing_of_this_machine_or_this_process(records: list[Record]) -> None:
    for record in records:
        text = str(record.fields)
        assert not re.search(r"0x[0-9a-f]{6}|/home/|/usr/|/root/", text), record.where
        assert sys.executable not in text and sys.base_prefix not in text, record.where


def test_the_same_in_every_process() -> None:
    # Two of their own: in this one, pytest has put something else for pdb.set_trace.
    code = "from lowprec.data.sources import PythonDocs; print(PythonDocs().fingerprint())"
    one, other = (
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("7", "8")
    )
    assert one == other and len(one.strip()) >= 32


def test_an_object_and_its_near_twins_stay_on_one_side(records: list[Record]) -> None:
    marked = held_out(np.array([record.split_key for record in records]), 0.05)
    sides: dict[str, set[bool]] = {}
    for record, side in zip(records, marked, strict=True):
        name = record.where.removesuffix(", arguments")
        first_sentence = re.split(r"(?<=[.!?])\s", (record.fields or {})["completion"].lower())[0]
        for key in (name, re.sub(r"\W+", " ", first_sentence)):
            if not key.startswith("call it as"):
                sides.setdefault(key, set()).add(bool(side))
    assert all(len(found) == 1 for found in sides.values())
    assert 0.03 < marked.mean() < 0.08
