"""``prepare_data``: from the recipe's group ``data`` to samples ready to be batched."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowprec.data.build import Builder, Counts, StoredSample, build_samples
from lowprec.data.cache import cache_key, cached, default_cache_dir, tokenizer_fingerprint
from lowprec.data.chat import Encoder
from lowprec.data.options import Data
from lowprec.data.packing import pack
from lowprec.data.records import Record
from lowprec.data.rows import PackedAttention, Rows
from lowprec.data.samples import PackedRows, RowsInMemory, Samples, write_samples
from lowprec.data.sources import Source, first_records, open_source
from lowprec.data.split import held_out
from lowprec.data.stream import Stream, stream_samples, to_items
from lowprec.data.summary import DataSummary, length_histogram
from lowprec.errors import UserError

NUM_PROMPTS = 8
_PLACE = "the user's words"
OnProgress = Callable[[str], object] | None

# What decides the tokenised samples; the rest of ``Data`` chooses among them or packs them.
_DECIDING = (
    "format",
    "columns",
    "system_prompt",
    "apply_chat_template",
    "train_on_prompt",
    "max_length",
    "overlong",
    "untrained",
    "max_samples",
)


@dataclass(kw_only=True, slots=True)
class Prompt:
    """A held-out question: its tokens, and the answer that the data give."""

    input_ids: list[int]
    question: str
    """The prompt as text: the user's words alone where the chat template lets them be told from its frame."""
    reference: str


@dataclass(kw_only=True, slots=True)
class PreparedData:
    """Training and held-out rows, and what the report says of them."""

    train: Rows | Stream
    evaluation: Rows
    summary: DataSummary
    prompts: list[Prompt]
    path: str
    format: str
    fingerprint: str
    """Tells the training rows by their contents, whatever they were read from; a stream by its options and its head."""


def prepare_data(data: Data, tokenizer: PreTrainedTokenizerBase, *, on_progress: OnProgress = None) -> PreparedData:
    """Read, check, tokenise (or find in the cache), split and pack; with ``data.streaming``, only what is held out.

    Several processes may call it at once: one builds, the others wait and read.

    Args:
        data: The recipe's group.
        tokenizer: A fast tokenizer; ``data.chat_template`` is set on it.
        on_progress: Told now and then how many records have been read, where they are not in the cache.

    Raises:
        UserError: there are no data, or bad records: the first five with their places, and how many there are.
    """
    encoder = Encoder(tokenizer, train_on_prompt=data.train_on_prompt, chat_template=data.chat_template)
    source = open_source(data.path, data)
    if data.streaming:
        return _prepare_stream(source, data, encoder)
    samples, counts = _samples(source, data, encoder, key="data.path", on_progress=on_progress)
    if data.eval_path is None:
        marked = held_out(samples.keys(), data.eval_fraction)
        train, evaluation = samples.part(np.flatnonzero(~marked)), samples.part(np.flatnonzero(marked))
    else:
        train, evaluation = samples, _eval_samples(data, encoder, on_progress)
    train_rows = _rows(train, data)
    summary = DataSummary(
        path=data.path,
        format=" + ".join(sorted(counts.layouts)),
        read=counts,
        max_length=data.max_length,
        eval_samples=len(evaluation),
        eval_also_in_train=int(np.isin(evaluation.keys(), train.keys()).sum()),
        train_samples=len(train),
        train_rows=len(train_rows),
        tokens=int(train.num_tokens.sum()),
        trained_tokens=int(train.num_trained.sum()),
        length_histogram=length_histogram(train.num_tokens, data.max_length),
    )
    if data.packing:
        summary.padding_share = 1 - int(train.num_tokens.sum()) / (len(train_rows) * data.max_length)
    return PreparedData(
        train=train_rows,
        evaluation=_rows(evaluation, data),
        summary=summary,
        prompts=_prompts(evaluation, tokenizer),
        path=data.path,
        format=summary.format,
        fingerprint=_digest(train.keys(), train.num_tokens, train.num_trained, train_rows.num_tokens),
    )


def _prepare_stream(source: Source, data: Data, encoder: Encoder) -> PreparedData:
    """Hold out ``data.eval_path``, or the first ``data.eval_samples`` samples of the stream."""
    builder = Builder(data, encoder)
    head: list[StoredSample] = []
    skip = 0
    evaluation: Rows
    if data.eval_path is None:
        for record in source.stream():
            skip += 1
            head += stream_samples(record, builder, source.name)
            if len(head) >= data.eval_samples:
                break
        row_length = data.max_length if data.packing else None
        attention = PackedAttention.POSITIONS if data.packing else None
        evaluation = RowsInMemory(to_items(head, row_length), attention)
        prompts = _prompts(RowsInMemory(to_items(head, None), None, [s.prompt_length for s in head]), encoder.tokenizer)
    else:
        samples = _eval_samples(data, encoder)
        evaluation, prompts = _rows(samples, data), _prompts(samples, encoder.tokenizer)
    if not len(evaluation):
        raise UserError(f"data.path={source.name}: the stream holds no sample to evaluate on.")
    summary = DataSummary(
        path=data.path,
        format=" + ".join(sorted(builder.counts.layouts)) or data.format,
        read=builder.counts,
        max_length=data.max_length,
        eval_samples=len(head) or int(evaluation.num_tokens.size),
    )
    held_out_keys = sorted({sample.key for sample in head})
    options = json.dumps([data.path, data.packing, data.shuffle_buffer, _deciding(data)], sort_keys=True)
    return PreparedData(
        train=Stream(source, builder, held_out=frozenset(held_out_keys), skip=skip),
        evaluation=evaluation,
        summary=summary,
        prompts=prompts,
        path=data.path,
        format=summary.format,
        fingerprint=_digest(np.array(held_out_keys), np.array(options)),
    )


def _eval_samples(data: Data, encoder: Encoder, on_progress: OnProgress = None) -> Samples:
    """All samples of ``data.eval_path``, read before training and never cut by ``data.max_samples``."""
    assert data.eval_path is not None
    whole = replace(data, streaming=False, max_samples=None)
    source = open_source(data.eval_path, whole, key="data.eval_path")
    return _samples(source, whole, encoder, key="data.eval_path", on_progress=on_progress)[0]


def _samples(
    source: Source, data: Data, encoder: Encoder, *, key: str, on_progress: OnProgress
) -> tuple[Samples, Counts]:
    """The tokenised samples of a source, from the cache where they are there."""
    fingerprint = source.fingerprint()
    entry_key = cache_key(
        source=fingerprint, options=_deciding(data), tokenizer=tokenizer_fingerprint(encoder.tokenizer)
    )

    def build(folder: Path) -> None:
        builder = Builder(data, encoder)
        records = _told(first_records(source, data.max_samples), source.name, on_progress)
        samples = build_samples(records, builder, path=source.name, key=key)
        write_samples(folder / "samples.arrow", samples)
        if source.fingerprint() != fingerprint:
            raise UserError(f"{key}={source.name} changed while it was read; start again when it is complete.")
        (folder / "counts.json").write_text(json.dumps(builder.counts.to_dict()), encoding="utf-8")

    folder = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_dir()
    entry = cached(folder, entry_key, build)
    counts = Counts(**json.loads((entry / "counts.json").read_text(encoding="utf-8")))
    return Samples.from_file(entry / "samples.arrow"), counts


def _told(records: Iterator[Record], name: str, on_progress: OnProgress) -> Iterator[Record]:
    for number, record in enumerate(records, 1):
        if on_progress is not None and number % 1000 == 0:
            on_progress(f"{name}: {number:,} records read")
        yield record


def _deciding(data: Data) -> dict[str, Any]:
    return {name: value for name, value in asdict(data).items() if name in _DECIDING}


def _rows(samples: Samples, data: Data) -> Rows:
    return PackedRows(samples, pack(samples.num_tokens.tolist(), data.max_length)) if data.packing else samples


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:32]


def _prompts(evaluation: Samples | RowsInMemory, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The first few held-out samples as questions: up to the first answer, or half of a plain text."""
    prompts = []
    for index in range(min(NUM_PROMPTS, len(evaluation))):
        ids = evaluation[index]["input_ids"].tolist()
        length = evaluation.prompt_length(index)
        if not 0 < length < len(ids):
            length = max(1, len(ids) // 2)
        reference = str(tokenizer.decode(ids[length:], skip_special_tokens=True)).strip()
        prompts.append(Prompt(input_ids=ids[:length], question=_question(ids[:length], tokenizer), reference=reference))
    return prompts


def _question(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = str(tokenizer.decode(ids))
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": _PLACE}]
        frame = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        before, _, after = frame.partition(_PLACE)
        if text.startswith(before) and text.endswith(after):
            return text.removeprefix(before).removesuffix(after).strip()
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
