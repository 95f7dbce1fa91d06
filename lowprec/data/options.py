"""The recipe's group ``data``: where the text is, how it is read, and how long a sample may be."""

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from lowprec.errors import UserError

FORMATS = ("auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text")
OVERLONG = ("truncate", "drop", "split")
UNTRAINED = ("error", "drop")


@dataclass(kw_only=True, slots=True)
class Columns:
    """The data's own names for the fields of a layout: ``data.columns.prompt=question``."""

    messages: Optional[str] = None  # noqa: UP045
    conversations: Optional[str] = None  # noqa: UP045
    prompt: Optional[str] = None  # noqa: UP045
    completion: Optional[str] = None  # noqa: UP045
    instruction: Optional[str] = None  # noqa: UP045
    input: Optional[str] = None  # noqa: UP045
    output: Optional[str] = None  # noqa: UP045
    text: Optional[str] = None  # noqa: UP045
    system: Optional[str] = None  # noqa: UP045
    tools: Optional[str] = None  # noqa: UP045


@dataclass(kw_only=True, slots=True)
class Data:
    """What to train on. Lengths are in tokens.

    Raises:
        UserError: from ``__post_init__`` for a value out of its range.
    """

    path: str = MISSING
    """A JSONL, JSON, CSV, Parquet or text file, a folder of them, a hub name, or ``python_docs``."""
    eval_path: Optional[str] = None  # noqa: UP045
    """Held-out data, given as ``path`` is. Without it ``eval_fraction`` of ``path`` is held out."""
    eval_fraction: float = 0.05
    """Share of the distinct contents of ``path`` that is held out (at least one)."""
    eval_samples: int = 128
    """With ``streaming`` and no ``eval_path``: how many samples at the head of the stream are held out."""
    format: str = "auto"
    """auto (by the fields of each file's first record), messages, sharegpt, prompt_completion, alpaca or text."""
    columns: Columns = field(default_factory=Columns)
    """The data's own names of these fields, where they differ."""
    split: str = "train"
    """The split of a hub data set, or of a folder whose file names tell splits."""
    subset: Optional[str] = None  # noqa: UP045
    """The configuration (second argument of ``load_dataset``) of a hub data set."""
    revision: Optional[str] = None  # noqa: UP045
    """Commit, tag or branch of a hub data set."""
    streaming: bool = False
    """Read while training instead of before it. Needs ``train.max_steps``."""
    shuffle_buffer: int = 1024
    """With ``streaming``: how many records are read, packed and shuffled together."""
    system_prompt: Optional[str] = None  # noqa: UP045
    """System message for conversations that have none."""
    chat_template: Optional[str] = None  # noqa: UP045
    """A Jinja file that replaces the tokenizer's chat template (and is saved with the trained model)."""
    apply_chat_template: bool = True
    """For prompt_completion and alpaca: as user and assistant turns where there is a chat template; false: as is."""
    train_on_prompt: bool = False
    """Loss on every token instead of on the assistant's turns or the completion alone."""
    max_length: int = 2048
    """Longest sample, and the length of a packed row."""
    packing: bool = False
    """Several samples in a row of ``max_length``, none of which sees another."""
    pad_to_multiple_of: Optional[int] = None  # noqa: UP045
    """Rows are padded to the next multiple of so many tokens above the longest of their micro-batch. None: to the
    longest; where ``train.cuda_graphs``, which wants few shapes, is or was settled to be true, an eighth of
    ``max_length``, or all of it if packed."""
    overlong: str = "truncate"
    """For samples longer than ``max_length``: truncate, drop, or (plain text only) split into several."""
    untrained: str = "error"
    """For samples without one trained token: error or drop."""
    max_samples: Optional[int] = None  # noqa: UP045
    """Read only the first so many records of ``path``."""
    cache_dir: Optional[str] = None  # noqa: UP045
    """Where tokenised data are kept; default ``$XDG_CACHE_HOME/lowprec`` or ``~/.cache/lowprec``."""

    def __post_init__(self) -> None:
        _one_of("data.format", self.format, FORMATS)
        _one_of("data.overlong", self.overlong, OVERLONG)
        _one_of("data.untrained", self.untrained, UNTRAINED)
        _at_least("data.max_length", self.max_length, 2)
        _at_least("data.eval_samples", self.eval_samples, 1)
        _at_least("data.shuffle_buffer", self.shuffle_buffer, 1)
        for key in ("max_samples", "pad_to_multiple_of"):
            if getattr(self, key) is not None:
                _at_least(f"data.{key}", getattr(self, key), 1)
        if not 0 < self.eval_fraction < 1:
            raise UserError(
                f"data.eval_fraction={self.eval_fraction} must lie between 0 and 1 (both excluded). "
                "To evaluate on other data, set data.eval_path."
            )

    def padding(self, few_shapes: bool) -> int:
        """What ``pad_to_multiple_of`` stands for."""
        if self.pad_to_multiple_of is not None:
            return self.pad_to_multiple_of
        if not few_shapes:
            return 1
        return self.max_length if self.packing else -(-self.max_length // 8)


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} is unknown; choose one of {', '.join(choices)}.")


def _at_least(key: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise UserError(f"{key}={value} is too small: it must be at least {smallest}.")
