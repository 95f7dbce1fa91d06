"""Fixtures of the data tests."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lowprec.data import Data, PreparedData, StepBatch, StepLoader, prepare_data
from lowprec.model import Model, load_tokenizer
from lowprec.testing import tiny_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, with a ChatML template."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(Model(model_name_or_path=str(smollm2_path)))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write records as JSON lines; a string is written as it is."""

    def write(*records: dict | str, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records),
            encoding="utf-8",
        )
        return path

    return write


@pytest.fixture
def prepared(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> Callable[..., PreparedData]:
    """Prepare ``number`` question/answer samples of various lengths."""

    def make(number: int = 40, **options) -> PreparedData:
        records = [{"prompt": f"question {i}", "completion": "y" * (1 + 7 * i % 23) + str(i)} for i in range(number)]
        data = Data(path=str(jsonl(*records)), cache_dir=str(tmp_path / "cache"), **{"max_length": 128, **options})
        return prepare_data(data, tokenizer)

    return make


class Steps:
    """Loaders and what their batches hold."""

    @staticmethod
    def loader(
        data: PreparedData,
        batch: int,
        steps: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 3,
        pad_to_multiple_of: int = 1,
    ) -> StepLoader:
        return StepLoader(
            data,
            per_device_batch_size=batch,
            gradient_accumulation_steps=steps,
            rank=rank,
            world_size=world,
            seed=seed,
            pad_token_id=256,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    @staticmethod
    def take(loader: StepLoader, number: int) -> list[StepBatch]:
        return list(islice(loader, number))

    @staticmethod
    def rows(batches: list[StepBatch]) -> list[tuple[int, ...]]:
        """The unpadded rows of the same step of one or several processes, sorted."""
        found = []
        for batch in batches:
            for inputs in batch.micro_batches:
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                    row = tuple(ids[mask.bool()].tolist())
                    if row != (256, 256):  # the padding of a process without a row
                        found.append(row)
        return sorted(found)

    @staticmethod
    def equal(one: StepBatch, other: StepBatch) -> bool:
        tensors = zip(one.micro_batches, other.micro_batches, strict=True)
        return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in tensors)


@pytest.fixture
def steps() -> type[Steps]:
    return Steps
