"""The five layouts of a record and the two things they come to: a conversation or a passage."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowprec.data.options import Columns, Data
from lowprec.data.records import RecordError

Fields = Mapping[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function_call": "assistant",
    "observation": "tool",
}
ROLES = ("system", "developer", "user", "assistant", "tool")

# The prompts of the Alpaca data (Taori et al., 2023), for tokenizers without a chat template.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(kw_only=True, slots=True)
class Conversation:
    """Chat turns in Hugging Face's form; ``trained[i]`` tells whether turn i is an answer to learn."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[dict[str, Any]] | None = None

    def content(self) -> Any:
        return {"messages": self.messages, "trained": self.trained, "tools": self.tools}


@dataclass(kw_only=True, slots=True)
class Passage:
    """Raw text: ``prompt`` is read, ``completion`` is learned."""

    completion: str
    prompt: str = ""
    splittable: bool = field(default=False)

    def content(self) -> Any:
        return {"prompt": self.prompt, "completion": self.completion}


Sample = Conversation | Passage


def content_key(content: Any) -> str:
    """32 hex digits that are equal for equal contents."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def detect_layout(fields: Fields) -> str:
    """The layout that a record's field names tell.

    Raises:
        RecordError: no layout has these fields.
    """
    for key in ("messages", "conversations", "conversation"):
        turns = fields.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return "sharegpt" if "from" in turns[0] else "messages"
    if "messages" in fields:
        return "messages"
    if "conversations" in fields:
        return "sharegpt"
    if "prompt" in fields and "completion" in fields:
        return "prompt_completion"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if "text" in fields:
        return "text"
    raise RecordError(
        "",
        f"its fields ({', '.join(map(str, fields)) or 'none'}) tell no known layout: messages, conversations "
        "(sharegpt), prompt + completion, instruction + output (alpaca), or text. Name its own fields by data.columns, "
        "for instance data.columns.prompt=question data.columns.completion=answer",
    )


def rename_columns(fields: Fields, columns: Columns) -> Fields:
    """The fields under the names of the layouts."""
    own_names = {name: own for name, own in asdict(columns).items() if own is not None and own in fields}
    kept = {name: value for name, value in fields.items() if name not in own_names.values()}
    return kept | {name: fields[own] for name, own in own_names.items()}


def read_sample(fields: Fields, layout: str, options: Data, *, has_template: bool) -> Sample:
    """Turn a record's fields into a conversation or a passage.

    Args:
        fields: The record, with its columns renamed.
        layout: One of ``FORMATS`` without ``auto``.
        options: The recipe's group ``data`` (``system_prompt`` and ``apply_chat_template`` are used).
        has_template: Whether the tokenizer can render conversations.

    Raises:
        RecordError: a field is missing, empty, of another type, or the turns are out of order.
    """
    as_chat = has_template and options.apply_chat_template
    sample = LAYOUTS[layout](fields, as_chat)
    if isinstance(sample, Conversation) and options.system_prompt and sample.messages[0]["role"] != "system":
        sample.messages.insert(0, {"role": "system", "content": options.system_prompt})
        sample.trained.insert(0, False)
    return sample


def _text(fields: Fields, name: str, *, may_be_empty: bool = False, prefix: str = "") -> str:
    value = fields.get(name)
    if value is None:
        if not may_be_empty:
            raise RecordError(prefix + name, "is missing")
        return ""
    if not isinstance(value, str):
        raise RecordError(prefix + name, f"is a {type(value).__name__}, not a string")
    if not may_be_empty and not value.strip():
        raise RecordError(prefix + name, "is empty")
    return value


def _turn_text(turn: Fields, name: str, prefix: str) -> str:
    """The text of a turn; OpenAI's list of text parts is joined."""
    value = turn.get(name)
    if isinstance(value, list):
        texts = []
        for index, part in enumerate(value):
            if not isinstance(part, Mapping) or part.get("type") != "text":
                raise RecordError(f"{prefix}{name}[{index}]", "is not a text part; only text can be trained on")
            texts.append(_text(part, "text", prefix=f"{prefix}{name}[{index}]."))
        return "".join(texts)
    return _text(turn, name, may_be_empty=bool(turn.get("tool_calls")), prefix=prefix)


def _conversation(turns: Any, key: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> Conversation:
    if not isinstance(turns, list):
        raise RecordError(key, "is missing" if turns is None else f"is a {type(turns).__name__}, not a list of turns")
    if not turns:
        raise RecordError(key, "is empty")
    messages: list[dict[str, Any]] = []
    trained: list[bool] = []
    for index, turn in enumerate(turns):
        prefix = f"{key}[{index}]."
        if not isinstance(turn, Mapping):
            raise RecordError(prefix[:-1], f"is a {type(turn).__name__}, not an object")
        written_role = _text(turn, role_key, prefix=prefix)
        role = roles.get(written_role)
        if role is None:
            raise RecordError(prefix + role_key, f"is {written_role!r}; known are {', '.join(roles)}")
        previous = messages[-1]["role"] if messages else None
        _check_order(role, previous, prefix + role_key)
        message = {
            name: value for name, value in turn.items() if name not in (role_key, text_key) and value is not None
        }
        trained.append(role == "assistant" and message.pop("weight", 1) != 0)
        messages.append({"role": role, "content": _turn_text(turn, text_key, prefix), **message})
    return Conversation(messages=messages, trained=trained)


def _check_order(role: str, previous: str | None, field_name: str) -> None:
    allowed_before = {
        "system": (None,),
        "developer": (None,),
        "user": (None, "system", "developer", "assistant"),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    if previous not in allowed_before[role]:
        place = "stands first" if previous is None else f"follows {previous}"
        raise RecordError(field_name, f"{role} {place}; turns are an optional system, then user and assistant by turns")


def _messages(fields: Fields, as_chat: bool) -> Conversation:
    key = next((name for name in ("messages", "conversations", "conversation") if name in fields), "messages")
    conversation = _conversation(fields.get(key), key, "role", "content", {role: role for role in ROLES})
    conversation.tools = fields.get("tools") or None
    return conversation


def _sharegpt(fields: Fields, as_chat: bool) -> Conversation:
    key = next((name for name in ("conversations", "conversation", "messages") if name in fields), "conversations")
    conversation = _conversation(fields.get(key), key, "from", "value", SHAREGPT_ROLES)
    if fields.get("system") and conversation.messages[0]["role"] != "system":
        conversation.messages.insert(0, {"role": "system", "content": _text(fields, "system")})
        conversation.trained.insert(0, False)
    return conversation


def _prompt_completion(fields: Fields, as_chat: bool) -> Sample:
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
        turns = [*fields["prompt"], *fields["completion"]]
        conversation = _conversation(turns, "prompt + completion", "role", "content", {role: role for role in ROLES})
        first_trained = len(fields["prompt"])
        conversation.trained = [flag and i >= first_trained for i, flag in enumerate(conversation.trained)]
        return conversation
    prompt, completion = _text(fields, "prompt"), _text(fields, "completion")
    return _question_and_answer(prompt, completion) if as_chat else Passage(prompt=prompt, completion=completion)


def _alpaca(fields: Fields, as_chat: bool) -> Sample:
    instruction, output = _text(fields, "instruction"), _text(fields, "output")
    context = _text(fields, "input", may_be_empty=True)
    if as_chat:
        question = f"{instruction}\n\n{context}" if context.strip() else instruction
        system = _text(fields, "system", may_be_empty=True)
        return _question_and_answer(question, output, system)
    form = ALPACA_WITH_INPUT if context.strip() else ALPACA_WITHOUT_INPUT
    return Passage(prompt=form.format(instruction=instruction, input=context), completion=output)


def _plain_text(fields: Fields, as_chat: bool) -> Passage:
    return Passage(completion=_text(fields, "text"), splittable=True)


def _question_and_answer(question: str, answer: str, system: str = "") -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages=messages, trained=[message["role"] == "assistant" for message in messages])


LAYOUTS: dict[str, Callable[[Fields, bool], Sample]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _plain_text,
}
