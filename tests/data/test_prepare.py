"""From files to samples: what is refused before training, what is counted, what is cached."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lowprec.data import Data, PreparedData, prepare_data
from lowprec.data.options import Columns
from lowprec.data.sources import FileSource
from lowprec.errors import UserError

Write = Callable[..., Path]
Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Prepare:
    def run(path: Path, **options: Any) -> PreparedData:
        return prepare_data(Data(path=str(path), cache_dir=str(tmp_path / "cache"), **options), tokenizer)

    return run


def pairs(number: int, length: int = 3) -> list[dict]:
    return [{"prompt": f"q{i}", "completion": "a" * length + str(i)} for i in range(number)]


def rows(prepared: PreparedData) -> list[list[int]]:
    return sorted(p[i]["input_ids"].tolist() for p in (prepared.train, prepared.evaluation) for i in range(len(p)))


def test_bad_records_are_told_by_place_the_first_five_and_their_number(jsonl: Write, prepare: Prepare) -> None:
    records: list[dict | str] = [*pairs(20)]
    for i in range(2, 9):
        records[i] = {"prompt": f"q{i}", "completion": i}
    records[12] = '{"prompt": '
    with pytest.raises(UserError) as caught:
        prepare(jsonl(*records))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("data.path=") and lines[0].endswith("data.jsonl: 8 of 20 records cannot be used:")
    assert lines[1] == "  data.jsonl, line 3: field completion: is a int, not a string"
    assert len(lines) == 7 and lines[-1] == "  ... and 3 more"


def test_the_key_of_bad_evaluation_data_is_told(jsonl: Write, prepare: Prepare) -> None:
    bad = jsonl({"prompt": "q"}, name="eval.jsonl")
    with pytest.raises(UserError, match=r"data\.eval_path=.*eval\.jsonl: 1 of 1 records.*\n.*tell no known layout"):
        prepare(jsonl(*pairs(4)), eval_path=str(bad))


def test_kinds_and_layouts_mix_in_a_folder(tmp_path: Path, prepare: Prepare) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, pairs(3))))
    (folder / "b.csv").write_text("instruction,output\nadd,two\nsub,one\n")
    (folder / "c.txt").write_text("first\n\nsecond\n")
    prepared = prepare(folder)
    assert prepared.summary.read.layouts == {"prompt_completion": 3, "alpaca": 2, "text": 2}
    assert prepared.format == "alpaca + prompt_completion + text"
    assert len(prepared.train) == 6 and len(prepared.evaluation) == 1


def test_columns_of_the_user_tell_the_layout(jsonl: Write, prepare: Prepare) -> None:
    path = jsonl(*({"question": f"q{i}", "answer": "a"} for i in range(4)))
    with pytest.raises(UserError, match=r"question, answer.*data\.columns\.prompt=question"):
        prepare(path)
    for wrong in (Columns(prompt="qestion", completion="answer"), Columns(prompt="question", system="ssytem")):
        with pytest.raises(UserError, match=r"data\.columns\.(prompt=qestion|system=ssytem): .* question, answer\."):
            prepare(path, columns=wrong)
    prepared = prepare(path, columns=Columns(prompt="question", completion="answer"))
    assert prepared.format == "prompt_completion"


def test_a_file_s_layout_is_that_of_its_first_record(jsonl: Write, prepare: Prepare) -> None:
    with pytest.raises(UserError, match="line 2: field prompt: is missing"):
        prepare(jsonl(*pairs(1), {"text": "x"}))


def test_truncating_dropping_splitting_are_counted(jsonl: Write, prepare: Prepare) -> None:
    path = jsonl(*pairs(6), {"prompt": "long", "completion": "b" * 300})
    truncated = prepare(path, max_length=100)
    assert truncated.summary.read.truncated == 1 and not truncated.summary.read.dropped
    assert max(map(len, rows(truncated))) == 100
    dropped = prepare(path, max_length=100, overlong="drop")
    assert dropped.summary.read.dropped == {"overlong": 1} and len(rows(dropped)) == 6
    texts = jsonl({"text": "c" * 250}, {"text": "d" * 10}, name="t.jsonl")
    split = prepare(texts, max_length=100, overlong="split")
    assert split.summary.read.split == 1
    assert sorted(map(len, rows(split))) == [11, 51, 100, 100]


def test_truncating_must_leave_something_to_learn(jsonl: Write, prepare: Prepare) -> None:
    path = jsonl(*pairs(6), {"prompt": "long " * 50, "completion": "b"})
    with pytest.raises(UserError, match=r"line 7: its prompt alone has \d+ tokens: data\.max_length=100 leaves no"):
        prepare(path, max_length=100)
    assert prepare(path, max_length=100, untrained="drop").summary.read.dropped == {"untrained": 1}


def test_a_conversation_without_an_answer(jsonl: Write, prepare: Prepare) -> None:
    answer = {"role": "assistant", "content": "a"}
    answered = [{"messages": [{"role": "user", "content": f"{i}"}, answer]} for i in range(3)]
    path = jsonl(*answered, {"messages": [{"role": "user", "content": "alone"}]})
    with pytest.raises(UserError, match="line 4: has no trained token"):
        prepare(path)
    assert prepare(path, untrained="drop").summary.read.dropped == {"untrained": 1}
    assert prepare(path, train_on_prompt=True).summary.read.samples == 4


def test_nothing_left_and_nothing_there(jsonl: Write, prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sample to train on \(3 records read; dropped: 3 overlong\)"):
        prepare(jsonl(*pairs(3)), max_length=5, overlong="drop")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"no sample to train on \(0 records read\)"):
        prepare(tmp_path / "empty.jsonl")


def test_the_split_is_by_content(jsonl: Write, prepare: Prepare) -> None:
    records = pairs(40)
    once = prepare(jsonl(*records), eval_fraction=0.1)
    twice = prepare(jsonl(*reversed(records), *records, name="b.jsonl"), eval_fraction=0.1)
    held = [{tuple(p.evaluation[i]["input_ids"]) for i in range(len(p.evaluation))} for p in (once, twice)]
    assert held[0] == held[1] and len(held[0]) == 4 and len(twice.evaluation) == 8
    assert not held[1] & {tuple(twice.train[i]["input_ids"]) for i in range(len(twice.train))}


def test_evaluation_data_that_are_also_trained_on_are_counted(jsonl: Write, prepare: Prepare) -> None:
    held_out = jsonl(*pairs(2), {"prompt": "new", "completion": "n"}, name="eval.jsonl")
    prepared = prepare(jsonl(*pairs(5)), eval_path=str(held_out), max_samples=1)
    assert len(prepared.train) == 1 and len(prepared.evaluation) == 3
    assert prepared.summary.eval_also_in_train == 1


def test_the_cache_notices_a_changed_file_and_changed_options(jsonl: Write, prepare: Prepare, tmp_path: Path) -> None:
    def entries() -> int:
        return len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()])

    path = jsonl(*pairs(4))
    first = prepare(path)
    assert rows(prepare(path)) == rows(first) and entries() == 1
    prepare(path, packing=True)  # packs the same samples
    prepare(path, eval_fraction=0.5)
    assert entries() == 1
    prepare(path, max_length=64)
    prepare(path, train_on_prompt=True)
    assert entries() == 3
    stamp = path.stat()
    path.write_text(path.read_text().replace("aaa0", "aab0"))  # as long as before, and
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as old
    assert rows(prepare(path)) != rows(first) and entries() == 4


def test_a_file_that_changes_while_it_is_read_is_refused(
    jsonl: Write, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(*pairs(4))
    read = FileSource.records

    def read_and_change(source: FileSource) -> Any:
        yield from read(source)
        path.write_text(path.read_text() + "\n")

    monkeypatch.setattr(FileSource, "records", read_and_change)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(path)


def test_progress_is_told_while_records_are_read(jsonl: Write, tmp_path: Path, tokenizer: Any) -> None:
    data = Data(path=str(jsonl(*pairs(2100))), cache_dir=str(tmp_path / "cache"))
    told: list[str] = []
    for _ in range(2):  # the second time from the cache
        prepare_data(data, tokenizer, on_progress=told.append)
    assert [text.rpartition(": ")[2] for text in told] == ["1,000 records read", "2,000 records read"]


def test_the_cached_counts_are_those_of_the_first_reading(jsonl: Write, prepare: Prepare) -> None:
    path = jsonl(*pairs(6), {"prompt": "long", "completion": "b" * 300})
    assert prepare(path, max_length=100).summary.to_dict() == prepare(path, max_length=100).summary.to_dict()


def test_summary_and_prompts(jsonl: Write, prepare: Prepare, tokenizer: PreTrainedTokenizerBase) -> None:
    prepared = prepare(jsonl(*pairs(40)), eval_fraction=0.1)
    summary = json.loads(json.dumps(prepared.summary.to_dict()))
    assert summary["train_samples"] == 36 and summary["eval_samples"] == 4 and summary["padding_share"] is None
    assert sum(summary["length_histogram"].values()) == 36
    assert summary["tokens"] == sum(len(prepared.train[i]["input_ids"]) for i in range(36))
    assert summary["trained_tokens"] < summary["tokens"]
    assert len(prepared.prompts) == 4
    for prompt in prepared.prompts:
        assert tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n")
        assert prompt.reference.startswith("aaa")
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(prepared.summary)
    text = console.export_text()
    assert "samples held out" in text and "36" in text


def test_packed_rows_and_their_padding(jsonl: Write, prepare: Prepare) -> None:
    path = jsonl(*pairs(40, length=20))
    loose, packed = prepare(path, eval_fraction=0.1), prepare(path, eval_fraction=0.1, packing=True, max_length=256)
    assert packed.train.num_trained.sum() == loose.train.num_trained.sum()
    assert packed.summary.train_rows == len(packed.train) < len(loose.train)
    tokens = packed.train.num_tokens.sum()
    assert packed.summary.padding_share == 1 - tokens / (len(packed.train) * 256)
    for i in range(len(packed.train)):
        item = packed.train[i]
        assert sum(item["lengths"]) == len(item["input_ids"]) == len(item["labels"]) <= 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "chatml"}, r"data\.format=chatml is unknown; choose one of auto, messages"),
        ({"overlong": "cut"}, r"data\.overlong=cut"),
        ({"untrained": "keep"}, r"data\.untrained=keep"),
        ({"max_length": 1}, r"data\.max_length=1 is too small"),
        ({"max_samples": 0}, r"data\.max_samples=0"),
        ({"eval_fraction": 1.0}, r"data\.eval_fraction=1\.0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Data(path="x", **options)


@pytest.mark.smollm2
def test_python_docs_with_the_real_tokenizer(tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    data = Data(path="python_docs", cache_dir=str(tmp_path), max_samples=400, max_length=256)
    prepared = prepare_data(data, smollm2_tokenizer)
    assert len(prepared.train) + len(prepared.evaluation) == 400
    assert smollm2_tokenizer.decode(prepared.prompts[0].input_ids).endswith("<|im_start|>assistant\n")
    assert prepared.train[0]["input_ids"][-1] in (smollm2_tokenizer.eos_token_id, 198)  # <|im_end|>, or its newline


def test_the_question_of_a_prompt_is_the_user_s_words(tokenizer, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Why {n}?"}, {"role": "assistant", "content": f"So {n}."}]}
        for n in range(8)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    prompts = prepare_data(
        Data(path=str(path), cache_dir=str(tmp_path / "cache"), eval_fraction=0.5), tokenizer
    ).prompts
    asked = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    assert prompts and all(asked[prompt.question] == prompt.reference for prompt in prompts)


def test_the_question_of_a_plain_text_is_its_beginning(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} little words in a row"}) for n in range(8)))
    prompt = prepare_data(Data(path=str(path), cache_dir=str(tmp_path / "cache")), tokenizer).prompts[0]
    assert f"{prompt.question}{prompt.reference}".replace(" ", "").endswith("littlewordsinarow")
