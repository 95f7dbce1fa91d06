"""From records to tokenised samples: read, check, encode, cut to length, count."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from lowprec.data.chat import IGNORE, Encoder, Tokens
from lowprec.data.layouts import Fields, Passage, content_key, detect_layout, read_sample, rename_columns
from lowprec.data.options import Data
from lowprec.data.records import Record, RecordError
from lowprec.errors import UserError

SHOWN_PROBLEMS = 5


@dataclass(kw_only=True, slots=True)
class StoredSample:
    """A tokenised sample. ``key`` is equal for samples that must stay on one side of the split."""

    input_ids: list[int]
    labels: list[int]
    num_trained: int
    prompt_length: int
    key: str


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of the records."""

    records: int = 0
    samples: int = 0
    conversations_by_answer: int = 0
    """Conversations that became one sample an answer, because the template rewrites earlier turns."""
    truncated: int = 0
    split: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    layouts: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict:
        return asdict(self)


class Builder:
    """Turns records into samples and keeps the counts. Layouts are told once a file, by its first record."""

    def __init__(self, options: Data, encoder: Encoder) -> None:
        self.options = options
        self.encoder = encoder
        self.counts = Counts()
        self._layout_of: dict[str, str] = {}
        self._unseen = {name: own for name, own in asdict(options.columns).items() if own is not None}
        self._first_fields: list[str] = []

    def samples(self, record: Record) -> list[StoredSample]:
        """The samples of one record.

        Raises:
            RecordError: what is wrong with it.
        """
        self.counts.records += 1
        if record.fields is None:
            raise RecordError("", record.problem or "holds nothing")
        self._first_fields = self._first_fields or [str(name) for name in record.fields]
        self._unseen = {name: own for name, own in self._unseen.items() if own not in record.fields}
        fields = rename_columns(record.fields, self.options.columns)
        layout = self._layout(record.where, fields)
        self.counts.layouts[layout] = self.counts.layouts.get(layout, 0) + 1
        sample = read_sample(fields, layout, self.options, has_template=self.encoder.has_template)
        key = record.split_key or content_key(sample.content())
        encoded = self.encoder.encode(sample)
        self.counts.conversations_by_answer += len(encoded) > 1
        splittable = isinstance(sample, Passage) and sample.splittable
        samples = []
        for tokens in encoded:
            for piece in self._to_length(tokens, splittable):
                num_trained = piece.num_trained()
                if num_trained == 0:
                    self._untrained(tokens)
                    continue
                samples.append(
                    StoredSample(
                        input_ids=piece.input_ids,
                        labels=piece.labels,
                        num_trained=num_trained,
                        prompt_length=piece.prompt_length,
                        key=key,
                    )
                )
        self.counts.samples += len(samples)
        return samples

    def check_columns(self, path: str) -> None:
        """Raises UserError where ``data.columns`` names a field that no record of ``path`` had."""
        if not self._unseen or not self._first_fields:
            return
        named = ", ".join(f"data.columns.{name}={own}" for name, own in self._unseen.items())
        raise UserError(
            f"{named}: no record that was read from data.path={path} has such a field. The fields of the first one: "
            f"{', '.join(self._first_fields)}."
        )

    def _layout(self, where: str, fields: Fields) -> str:
        if self.options.format != "auto":
            return self.options.format
        file = where.partition(", ")[0]
        if file not in self._layout_of:
            self._layout_of[file] = detect_layout(fields)
        return self._layout_of[file]

    def _to_length(self, tokens: Tokens, splittable: bool) -> Iterator[Tokens]:
        longest = self.options.max_length
        if len(tokens.input_ids) <= longest:
            yield tokens
        elif self.options.overlong == "drop":
            self._drop("overlong")
        elif self.options.overlong == "split" and splittable:
            self.counts.split += 1
            for start in range(0, len(tokens.input_ids), longest):
                labels = tokens.labels[start : start + longest]
                if len(labels) > 1:  # a single token at the end predicts nothing
                    labels[0] = IGNORE
                    yield Tokens(input_ids=tokens.input_ids[start : start + longest], labels=labels, prompt_length=0)
        else:
            self.counts.truncated += 1
            yield Tokens(
                input_ids=tokens.input_ids[:longest], labels=tokens.labels[:longest], prompt_length=tokens.prompt_length
            )

    def _untrained(self, whole: Tokens) -> None:
        if self.options.untrained == "drop":
            return self._drop("untrained")
        if whole.num_trained():
            raise RecordError(
                "",
                f"its prompt alone has {whole.prompt_length} tokens: data.max_length={self.options.max_length} leaves "
                "no trained token; raise data.max_length, or set data.overlong=drop or data.untrained=drop",
            )
        raise RecordError("", "has no trained token (no answer to learn); mend it, or set data.untrained=drop")

    def _drop(self, reason: str) -> None:
        self.counts.dropped[reason] = self.counts.dropped.get(reason, 0) + 1


def build_samples(
    records: Iterable[Record], builder: Builder, *, path: str, key: str = "data.path"
) -> Iterator[StoredSample]:
    """Yield the samples of all records; after a first bad record, the rest is only checked.

    Raises:
        UserError: after the last record: a name of ``data.columns`` that no record has; the first five problems and
            their number; or there was no sample.
    """
    problems: list[str] = []
    num_problems = 0
    for record in records:
        try:
            samples = builder.samples(record)
        except RecordError as error:
            num_problems += 1
            if num_problems <= SHOWN_PROBLEMS:
                problems.append(f"{record.where}: {error}")
        else:
            if not num_problems:
                yield from samples
    if key == "data.path":  # held-out data may have the layouts' own names
        builder.check_columns(path)
    if num_problems:
        raise UserError(_told(path, key, problems, num_problems, builder.counts.records))
    if not builder.counts.samples:
        dropped = ", ".join(f"{number} {reason}" for reason, number in builder.counts.dropped.items())
        raise UserError(
            f"{key}={path}: there is no sample to train on ({builder.counts.records} records read"
            + (f"; dropped: {dropped})." if dropped else ").")
        )


def _told(path: str, key: str, problems: list[str], number: int, num_records: int) -> str:
    listed = "\n".join(f"  {problem}" for problem in problems)
    more = f"\n  ... and {number - len(problems)} more" if number > len(problems) else ""
    return f"{key}={path}: {number} of {num_records} records cannot be used:\n{listed}{more}"
