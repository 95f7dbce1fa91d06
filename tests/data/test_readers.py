"""Every kind of file gives its records with their places, and what cannot be read is named by its place."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from lowprec.data.readers import kind_of, read_file

RECORDS = [{"prompt": "one, two\nthree", "completion": 'ä "q"'}, {"prompt": "2", "completion": "NaN"}]


def read(path: Path) -> list[tuple[str, dict | str | None]]:
    return [(r.where, r.fields if r.problem is None else r.problem) for r in read_file(path, path.name)]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(RECORDS[0]) + "\n\n  \n" + json.dumps(RECORDS[1]), encoding="utf-8")
    assert read(path) == [("a.jsonl, line 1", RECORDS[0]), ("a.jsonl, line 4", RECORDS[1])]


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n{"text": \n[1]\n{"text": "caf\xe9"}\n{"text": "y"}\n')
    where, told = zip(*read(path), strict=True)
    assert where == tuple(f"a.jsonl, line {n}" for n in range(1, 6))
    assert told[1] == "invalid JSON at column 10: Expecting value"
    assert told[2] == "a list stands where an object with named fields is expected"
    assert told[3].startswith("byte 14 (0xe9) is not UTF-8")
    assert told[4] == {"text": "y"}


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for document in (RECORDS, {"version": 1, "data": RECORDS}):
        path.write_text(json.dumps(document))
        assert read(path) == [("a.json, index 0", RECORDS[0]), ("a.json, index 1", RECORDS[1])]
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    assert [where for where, _ in read(path)] == ["a.json, line 1", "a.json, line 2"]
    path.write_text('[{"a": 1},\n {"a": }]')
    assert read(path) == [("a.json, line 2", "invalid JSON: Expecting value")]
    path.write_text('"text"')
    assert "neither an array" in str(read(path)[0][1])
    conversation = {"messages": [{"role": "user", "content": "q"}]}
    path.write_text(json.dumps(conversation))
    assert read(path) == [("a.json, index 0", conversation)]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"one, two\nthree","ä ""q"""\n2,NaN\n3\n4,\n', encoding="utf-8")
    assert read(path) == [
        ("a.csv, row 1", RECORDS[0]),
        ("a.csv, row 2", RECORDS[1]),
        ("a.csv, row 3", {"prompt": "3", "completion": ""}),
        ("a.csv, row 4", {"prompt": "4", "completion": ""}),
    ]
    path.write_text("a,b\n1,2\n1,2,3\n")
    assert read(path)[-1][0] == "a.csv, line 3"
    path.write_bytes(b"a,b\n1,2\n1,caf\xe9\n")
    assert read(path)[-1][0] == "a.csv, line 3" and "not UTF-8" in str(read(path)[-1][1])
    path.write_text("text\n" + "x" * 200_000 + "\n")  # longer than the csv module allows
    assert read(path) == [("a.csv, row 1", {"text": "x" * 200_000})]
    path.write_text("")
    assert read(path) == []


def test_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\na,b\tc\n")
    assert read(tmp_path / "a.tsv") == [("a.tsv, row 1", {"prompt": "a,b", "completion": "c"})]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), path)
    assert read(path) == [("a.parquet, row 1", RECORDS[0]), ("a.parquet, row 2", RECORDS[1])]
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as Parquet" in str(read(path)[0][1])


def test_text_is_read_by_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\none\n two\n\n\nthree\r\n\n", newline="")
    assert read(path) == [("a.txt, line 2", {"text": "one\n two"}), ("a.txt, line 6", {"text": "three"})]


def test_compressed_files(tmp_path: Path) -> None:
    for name, text in {"a.jsonl.gz": json.dumps({"text": "x"}), "a.csv.gz": "text\nx\n", "a.txt.gz": "x\n"}.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert read(tmp_path / name)[0][1] == {"text": "x"}
    assert kind_of(Path("a.parquet.gz")) is None


@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=12), max_size=3), max_size=5))
def test_jsonl_gives_back_what_was_written(tmp_path_factory, records: list[dict]) -> None:
    path = tmp_path_factory.mktemp("r") / "a.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    assert [fields for _, fields in read(path)] == records
