"""A stream trains every sample once an epoch, resumes exactly, and is the same for any number of processes."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from lowprec.data import Data, PreparedData, StepLoader, prepare_data
from lowprec.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def stream(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreparedData]:
    """Three files of 17 records each; the first 5 samples are held out."""

    def make(**options) -> PreparedData:
        folder = tmp_path / "stream"
        folder.mkdir(exist_ok=True)
        for file in range(3):
            lines = [
                json.dumps({"prompt": f"q {file} {i}", "completion": "y" * (i + 1) + f"{file}"}) for i in range(17)
            ]
            (folder / f"part{file}.jsonl").write_text("\n".join(lines) + "\n")
        options = {"shuffle_buffer": 8, "eval_samples": 5, "max_length": 64, **options}
        return prepare_data(Data(path=str(folder), streaming=True, **options), tokenizer)

    return make


def texts(steps: Any, one: StepLoader, epochs: float) -> list[str]:
    """The rows of the steps before ``epochs`` have passed."""
    found = []
    for batch in one:
        if batch.epoch >= epochs:
            return found
        found += steps.rows([batch])
    return found


def test_every_sample_once_an_epoch_and_none_that_is_held_out(steps: Any, stream: Callable[..., PreparedData]) -> None:
    data = stream()
    assert len(data.evaluation) == 5
    held_out = {tuple(data.evaluation[i]["input_ids"]) for i in range(5)}
    seen = texts(steps, steps.loader(data, 2, 2), 1)
    assert len(seen) == len(set(seen)) == 51 - 5
    assert not held_out & set(seen)
    assert len(data.prompts) == 5 and data.prompts[0].reference == "y0"


def test_blocks_are_shuffled_otherwise_each_epoch(steps: Any, stream: Callable[..., PreparedData]) -> None:
    one = steps.loader(stream(), 1, 1)
    batches = steps.take(one, 92)
    first, second = [steps.rows([b]) for b in batches[:46]], [steps.rows([b]) for b in batches[46:]]
    assert sorted(first) == sorted(second) and first != second
    assert first[:8] != sorted(first[:8])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 5, 11, 12, 13, 20])
def test_resuming_is_exact(steps: Any, stream: Callable[..., PreparedData], stop: int, packing: bool) -> None:
    data = stream(packing=packing)
    undisturbed = steps.take(steps.loader(data, 2, 2), 28)
    first = steps.loader(data, 2, 2)
    steps.take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = steps.loader(stream(packing=packing), 2, 2)
    resumed.load_state_dict(state)
    assert all(map(steps.equal, undisturbed[stop:], steps.take(resumed, 28 - stop)))


def test_resuming_with_other_blocks_is_refused(steps: Any, stream: Callable[..., PreparedData]) -> None:
    state = steps.loader(stream(), 2, 2).state_dict()
    for other in ({"shuffle_buffer": 9}, {"packing": True}, {"eval_samples": 6}, {"max_length": 65}):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            steps.loader(stream(**other), 2, 2).load_state_dict(state)


def test_processes_share_each_step_without_duplicates(steps: Any, stream: Callable[..., PreparedData]) -> None:
    data = stream()
    whole = steps.take(steps.loader(data, 4, 1), 15)
    halves = [steps.take(steps.loader(data, 2, 1, rank, 2), 15) for rank in range(2)]
    for step, expected in enumerate(whole):
        assert steps.rows([half[step] for half in halves]) == steps.rows([expected])
        assert sum(half[step].num_trained_tokens for half in halves) == expected.num_trained_tokens_global


def test_a_bad_record_is_named_when_it_is_reached(steps: Any, jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    records: list[dict | str] = [{"prompt": f"q{i}", "completion": "a"} for i in range(30)]
    records[20] = {"prompt": "q20", "completion": 7}
    data = Data(path=str(jsonl(*records)), streaming=True, eval_samples=2, shuffle_buffer=4)
    batches = iter(steps.loader(prepare_data(data, tokenizer), 2, 1))
    assert len(list(islice(batches, 5))) == 5
    with pytest.raises(UserError, match=r"data\.jsonl, line 21 cannot be used: field completion: is a int"):
        list(islice(batches, 10))


def test_an_endless_search_is_refused(steps: Any, jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(*({"prompt": "q", "completion": "a"} for _ in range(9)))
    data = prepare_data(Data(path=str(path), streaming=True, eval_samples=2), tokenizer)
    with pytest.raises(UserError, match="no sample to train on"):  # all contents equal the held-out one
        next(iter(steps.loader(data, 1, 1)))


def test_a_stream_needs_max_steps(steps: Any, stream: Callable[..., PreparedData]) -> None:
    one = steps.loader(stream(), 1, 1)
    assert one.steps_per_epoch is None and one.padding_share is None
    with pytest.raises(UserError, match=r"train\.max_steps"):
        one.num_steps(1)


def test_max_samples_and_eval_path(steps: Any, stream: Callable[..., PreparedData], jsonl: Write) -> None:
    held_out = jsonl({"prompt": "other", "completion": "answer"}, name="eval.jsonl")
    data = stream(max_samples=20, eval_path=str(held_out), cache_dir=str(held_out.parent / "cache"))
    assert len(data.evaluation) == 1
    assert len(texts(steps, steps.loader(data, 1, 1), 1)) == 20


def test_a_saved_data_set_streams(steps: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saved = datasets.Dataset.from_dict({"prompt": [f"q{i}" for i in range(12)], "completion": ["a"] * 12})
    saved.save_to_disk(str(tmp_path / "saved"))
    data = prepare_data(Data(path=str(tmp_path / "saved"), streaming=True, eval_samples=2, shuffle_buffer=4), tokenizer)
    one = steps.loader(data, 1, 1)
    batches = steps.take(one, 12)
    resumed = steps.loader(data, 1, 1)
    resumed.load_state_dict(json.loads(json.dumps(batches[6].state)))
    assert all(map(steps.equal, batches[7:], steps.take(resumed, 5)))
