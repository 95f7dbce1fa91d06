"""From a sample to token ids and labels, with the loss where it belongs.

Everything is decided in the rendered text and carried to tokens by their offsets, so that a text is tokenised once and
as a whole. An answer's characters are found by the template's own ``{% generation %}`` marks where it has them, and
otherwise by rendering the turns up to it: the text before the answer must be a prefix of the text with it. A template
that rewrites earlier turns (Qwen3 drops the thinking of all but the last answer) breaks that rule for a whole
conversation; then every answer becomes a sample of its own, in the text that the model would see when it gives it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lowprec.data.layouts import Conversation, Passage, Sample
from lowprec.data.records import RecordError
from lowprec.errors import UserError

IGNORE = -100
"""The label of a token that is not trained (PyTorch's and Hugging Face's convention)."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


@dataclass(kw_only=True, slots=True)
class Tokens:
    """``labels`` are not shifted: ``labels[i]`` is ``input_ids[i]`` or IGNORE. ``prompt_length`` tokens come before the
    first answer (0 where everything is answer)."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int

    def num_trained(self) -> int:
        """Tokens that give loss: the first one is never predicted."""
        return sum(label != IGNORE for label in self.labels[1:])


class Encoder:
    """Encodes samples with one tokenizer.

    Args:
        tokenizer: A fast tokenizer (offsets are needed). ``chat_template`` replaces its template in place.
        train_on_prompt: Labels on every token.
        chat_template: A Jinja file.

    Raises:
        UserError: the tokenizer is a slow one, has no end-of-sequence token, or the template file cannot be read.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, train_on_prompt: bool = False, chat_template: str | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets, which the loss mask needs; "
                "use a model folder with a tokenizer.json (a fast tokenizer)."
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, so the model could not learn to stop; "
                "set eos_token in its tokenizer_config.json."
            )
        if chat_template is not None:
            tokenizer.chat_template = _read_template(chat_template)
        self.tokenizer = tokenizer
        self.train_on_prompt = train_on_prompt
        markers = sorted((token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
        self._ends_with_marker = re.compile(rf"(?:{self._marker.pattern})\Z")

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def encode(self, sample: Sample) -> list[Tokens]:
        """One sample, or several where the template rewrites earlier turns.

        Raises:
            RecordError: the template refuses the turns, or gives an answer another text than its prompt announces.
            UserError: a conversation needs a chat template and there is none.
        """
        if isinstance(sample, Passage):
            return [self._encode_passage(sample)]
        if not self.has_template:
            raise UserError(
                "the data are conversations, but the tokenizer has no chat template. Set data.chat_template to a Jinja "
                "file, take the model's chat variant (often named -Instruct or -it), or bring the data as "
                "prompt and completion, alpaca or text, which need no template."
            )
        return self._encode_conversation(sample)

    def _encode_passage(self, passage: Passage) -> Tokens:
        text = passage.prompt + passage.completion
        bos = self.tokenizer.bos_token
        tokens = self._tokenise(
            text,
            [(len(passage.prompt), len(text))],
            add_special_tokens=not (bos and text.startswith(bos)),
        )
        return self._with_end(tokens)

    def _encode_conversation(self, conversation: Conversation) -> list[Tokens]:
        messages, trained = conversation.messages, conversation.trained
        if not self.train_on_prompt:
            # What follows the last answer to learn cannot change its loss.
            num_used = max((i + 1 for i, flag in enumerate(trained) if flag), default=len(messages))
            messages, trained = messages[:num_used], trained[:num_used]
        text, spans = self._answers(messages, trained, conversation.tools)
        if spans is not None or self.train_on_prompt:
            return [self._encode_rendered(text, spans or [])]
        encoded = []
        for index in (i for i, flag in enumerate(trained) if flag):
            last_only = [False] * index + [True]
            text, spans = self._answers(messages[: index + 1], last_only, conversation.tools)
            if spans is None:
                raise RecordError(
                    f"messages[{index}]",
                    "the chat template gives this answer another text than its generation prompt announces, so the "
                    "loss cannot be placed; give a template with {% generation %} marks by data.chat_template",
                )
            encoded.append(self._encode_rendered(text, spans))
        return encoded

    def _encode_rendered(self, text: str, spans: list[Span]) -> Tokens:
        tokens = self._tokenise(text, spans, add_special_tokens=False)
        stops = bool(spans) and self._ends_with_marker.search(text[: spans[-1][1]])
        return tokens if stops or not spans else self._with_end(tokens)

    def _until_marker(self, text: str, start: int, end: int) -> Span:
        """Without the white space behind the marker that ends the turn: the model has stopped by then."""
        without_space = start + len(text[start:end].rstrip())
        return start, without_space if self._ends_with_marker.search(text[start:without_space]) else end

    def _with_marker(self, text: str, start: int, end: int) -> Span:
        """With the marker that follows, where the template leaves it out of its generation."""
        following = None if self._ends_with_marker.search(text[start:end].rstrip()) else self._marker.match(text, end)
        return start, following.end() if following else end

    def _answers(self, messages: list[dict], trained: list[bool], tools: Any) -> tuple[str, list[Span] | None]:
        """The rendered text and the characters of the trained answers; None where the prefix rule is broken."""
        template = self.tokenizer.get_chat_template(tools=tools)
        if _GENERATION.search(template):
            return self._marked_answers(template, messages, trained, tools)
        text = self._render(messages, tools)
        spans = []
        for index in (i for i, flag in enumerate(trained) if flag):
            before = self._render(messages[:index], tools, add_generation_prompt=True)
            after = text if index + 1 == len(messages) else self._render(messages[: index + 1], tools)
            if not (text.startswith(after) and after.startswith(before)):
                return text, None
            spans.append(self._until_marker(text, len(before), len(after)))
        return text, spans

    def _marked_answers(
        self, template: str, messages: list[dict], trained: list[bool], tools: Any
    ) -> tuple[str, list[Span]]:
        (text,), (marks,) = self._refusals_named(
            render_jinja_template,
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marks) != len(turns):
            raise RecordError(
                "messages",
                f"the chat template marks {len(marks)} generations in a conversation of {len(turns)} assistant turns",
            )
        return text, [
            self._until_marker(text, *self._with_marker(text, *mark))
            for turn, mark in zip(turns, marks, strict=True)
            if trained[turn]
        ]

    def _render(self, messages: list[dict], tools: Any, *, add_generation_prompt: bool = False) -> str:
        return self._refusals_named(
            self.tokenizer.apply_chat_template,
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    @staticmethod
    def _refusals_named(render: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return render(*args, **kwargs)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise RecordError("messages", f"the model's chat template refuses them: {error}") from error

    def _tokenise(self, text: str, spans: list[Span], *, add_special_tokens: bool) -> Tokens:
        """A token belongs to an answer if its last character does."""
        encoding = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids = encoding["input_ids"]
        ends = np.array([end for _, end in encoding["offset_mapping"]], dtype=np.int64)
        answer = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            answer |= (start < ends) & (ends <= end)
        prompt_length = int(answer.argmax()) if answer.any() else len(ids)
        if self.train_on_prompt:
            answer[:] = True
        answer[:1] = False  # nothing predicts the first token
        labels = np.where(answer, np.array(ids, dtype=np.int64), IGNORE).tolist()
        return Tokens(input_ids=ids, labels=labels, prompt_length=prompt_length)

    def _with_end(self, tokens: Tokens) -> Tokens:
        """The sample with a trained end-of-sequence token, so that the model learns to stop."""
        end = self.tokenizer.eos_token_id
        if tokens.input_ids and tokens.input_ids[-1] == end:
            tokens.labels[-1] = end
        else:
            tokens.input_ids.append(end)
            tokens.labels.append(end)
        return tokens


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template={path} cannot be read as a Jinja file: {error}.") from error
