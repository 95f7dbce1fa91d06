"""What a path stands for."""

from pathlib import Path

import datasets
import pytest

from lowprec.data.options import Data
from lowprec.data.sources import open_source
from lowprec.errors import UserError


def names(folder: Path, split: str = "train") -> list[str]:
    source = open_source(str(folder), Data(path="x", split=split))
    return [str(path.relative_to(folder)) for path in source.files]  # type: ignore[attr-defined]


def fill(folder: Path, *files: str) -> Path:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}\n')
    return folder


def test_a_folder_is_all_its_data_files_in_order(tmp_path: Path) -> None:
    fill(tmp_path, "b.jsonl", "a.csv", "sub/c.txt", "d.jsonl.gz")
    fill(tmp_path, "README.md", "LICENSE.txt", "dataset_infos.json", ".git/x.json")  # not data
    assert names(tmp_path) == ["a.csv", "b.jsonl", "d.jsonl.gz", "sub/c.txt"]


def test_file_names_that_tell_splits(tmp_path: Path) -> None:
    fill(tmp_path, "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test.jsonl")
    fill(tmp_path, "validation/a.jsonl")
    assert names(tmp_path) == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert names(tmp_path, "test") == ["data/test.jsonl"]
    assert names(tmp_path, "validation") == ["validation/a.jsonl"]


def test_a_split_that_no_file_tells(tmp_path: Path) -> None:
    fill(tmp_path, "test.jsonl")
    with pytest.raises(UserError, match=r"splits test, not data\.split=train"):
        names(tmp_path)


def test_a_word_within_a_word_is_no_split(tmp_path: Path) -> None:
    assert names(fill(tmp_path, "contest.jsonl", "trains.jsonl")) == ["contest.jsonl", "trains.jsonl"]


def test_what_is_not_there_or_not_data(tmp_path: Path) -> None:
    options = Data(path="x")
    for path in (str(tmp_path / "none.jsonl"), "none.jsonl", "./none", "a/b/c"):
        with pytest.raises(UserError, match="no such file or folder"):
            open_source(path, options, key="data.eval_path")
    with pytest.raises(UserError, match=r"data\.eval_path=.*holds no data file"):
        open_source(str(tmp_path), options, key="data.eval_path")
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(UserError, match=r"\.docx suffix; data files end in \.jsonl"):
        open_source(str(tmp_path / "a.docx"), options)


def test_saved_data_sets(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict({"train": train, "other": train.select([1])}).save_to_disk(str(tmp_path / "saved"))
    source = open_source(str(tmp_path / "saved"), Data(path="x", split="other"))
    (record,) = source.records()
    assert record.fields == {"text": "b"} and record.where.endswith("saved, row 1")
    with pytest.raises(UserError, match=r"no data\.split=dev; it has train, other"):
        open_source(str(tmp_path / "saved"), Data(path="x", split="dev"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.path=nobody/nothing: .*hub cannot be reached.*python_docs"):
        open_source("nobody/nothing", Data(path="x", streaming=streaming))


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl")
    source = open_source(str(tmp_path), Data(path="x"))
    before = source.fingerprint()
    assert before == source.fingerprint()
    (tmp_path / "a.jsonl").write_text('{"text": "y"}\n')
    assert source.fingerprint() != before
