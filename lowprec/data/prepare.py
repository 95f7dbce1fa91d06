"""``prepare_data``: from the recipe's group ``data`` to samples ready to be batched."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowprec.data.build import Builder, Counts, build_rows
from lowprec.data.cache import cache_key, cached, default_cache_dir, tokenizer_fingerprint
from lowprec.data.chat import Encoder
from lowprec.data.options import Data
from lowprec.data.packing import pack
from lowprec.data.samples import PackedRows, Rows, Samples, write_rows
from lowprec.data.sources import Source, first_records, open_source
from lowprec.data.split import held_out
from lowprec.data.summary import DataSummary, summarise

NUM_PROMPTS = 8

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
    reference: str


@dataclass(kw_only=True, slots=True)
class PreparedData:
    """Training and held-out rows, and what the report says of them."""

    train: Rows
    evaluation: Rows
    summary: DataSummary
    prompts: list[Prompt]
    path: str
    format: str


def prepare_data(data: Data, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreparedData:
    """Read, check, tokenise (or find in the cache), split and pack.

    Several processes may call it at once: one builds, the others wait and read.

    Args:
        data: The recipe's group.
        tokenizer: A fast tokenizer; ``data.chat_template`` is set on it.
        seed: Of the run. Map-style data do not depend on it: the split is by content, the order is the loader's.

    Raises:
        UserError: there are no data, or bad records: the first five with their places, and how many there are.
    """
    encoder = Encoder(tokenizer, train_on_prompt=data.train_on_prompt, chat_template=data.chat_template)
    samples, counts = _samples(open_source(data.path, data), data, encoder, key="data.path")
    also_in_train = 0
    if data.eval_path is None:
        marked = held_out(samples.keys(), data.eval_fraction)
        train, evaluation = samples.part(np.flatnonzero(~marked)), samples.part(np.flatnonzero(marked))
    else:
        source = open_source(data.eval_path, data, key="data.eval_path")
        train, (evaluation, _) = samples, _samples(source, data, encoder, key="data.eval_path")
        also_in_train = int(np.isin(evaluation.keys(), train.keys()).sum())
    train_rows, eval_rows = (_rows(part, data) for part in (train, evaluation))
    summary = summarise(
        path=data.path,
        read=counts,
        train=train,
        rows=train_rows,
        eval_samples=len(evaluation),
        eval_also_in_train=also_in_train,
        max_length=data.max_length,
    )
    return PreparedData(
        train=train_rows,
        evaluation=eval_rows,
        summary=summary,
        prompts=_prompts(evaluation, tokenizer),
        path=data.path,
        format=summary.format,
    )


def _samples(source: Source, data: Data, encoder: Encoder, *, key: str) -> tuple[Samples, Counts]:
    """The tokenised samples of a source, from the cache where they are there."""
    deciding = {name: value for name, value in asdict(data).items() if name in _DECIDING}
    entry_key = cache_key(
        source=source.fingerprint(), options=deciding, tokenizer=tokenizer_fingerprint(encoder.tokenizer)
    )

    def build(folder: Path) -> None:
        builder = Builder(data, encoder)
        records = first_records(source, data.max_samples)
        rows = build_rows(records, builder, path=source.name, key=key)
        write_rows(folder / "samples.arrow", rows)
        (folder / "counts.json").write_text(json.dumps(builder.counts.to_dict()), encoding="utf-8")

    folder = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_dir()
    entry = cached(folder, entry_key, build)
    counts = Counts(**json.loads((entry / "counts.json").read_text(encoding="utf-8")))
    return Samples.from_file(entry / "samples.arrow"), counts


def _rows(samples: Samples, data: Data) -> Rows:
    return PackedRows(samples, pack(samples.num_tokens.tolist(), data.max_length)) if data.packing else samples


def _prompts(evaluation: Samples, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The first few held-out samples as questions: up to the first answer, or half of a plain text."""
    prompts = []
    for index in range(min(NUM_PROMPTS, len(evaluation))):
        ids = evaluation[index]["input_ids"]
        length = evaluation.prompt_length(index) or max(1, len(ids) // 2)
        reference = tokenizer.decode(ids[length:], skip_special_tokens=True).strip()
        prompts.append(Prompt(input_ids=ids[:length], reference=reference))
    return prompts
