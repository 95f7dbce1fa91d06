"""Layouts are told by their fields; what is wrong is named by its field."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowprec.data.layouts import (
    ALPACA_WITH_INPUT,
    Conversation,
    Passage,
    content_key,
    detect_layout,
    read_sample,
    rename_columns,
)
from lowprec.data.options import Columns, Data
from lowprec.data.records import RecordError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def read(fields: dict[str, Any], has_template: bool = True, **options: Any) -> Conversation | Passage:
    data = Data(path="x", **options)
    layout = detect_layout(fields) if data.format == "auto" else data.format
    return read_sample(fields, layout, data, has_template=has_template)


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({"messages": [USER, ASSISTANT], "id": 1}, "messages"),
        ({"conversations": [USER, ASSISTANT]}, "messages"),
        ({"conversations": [HUMAN, GPT]}, "sharegpt"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"text": "t", "meta": {}}, "text"),
    ],
)
def test_layouts_are_told_by_their_fields(fields: dict, layout: str) -> None:
    assert detect_layout(fields) == layout


def test_unknown_fields_are_listed_with_the_remedy() -> None:
    with pytest.raises(RecordError, match=r"question, answer.*data\.columns"):
        detect_layout({"question": "q", "answer": "a"})


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [HUMAN, GPT]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "q", "output": "a"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
    ],
)
def test_all_layouts_come_to_the_same_conversation(fields: dict) -> None:
    assert read(fields) == Conversation(messages=[USER, ASSISTANT], trained=[False, True])


def test_columns_rename_fields() -> None:
    columns = Columns(prompt="question", completion="prompt", input="not there")
    fields = rename_columns({"question": "q", "prompt": "a", "id": 1}, columns)
    assert fields == {"prompt": "q", "completion": "a", "id": 1}


def test_without_template_or_on_request_the_text_stays_as_it_is() -> None:
    fields = {"prompt": "q", "completion": "a"}
    assert (
        read(fields, has_template=False)
        == read(fields, apply_chat_template=False)
        == Passage(prompt="q", completion="a")
    )
    alpaca = read({"instruction": "Add.", "input": "1 1", "output": "2"}, has_template=False)
    assert alpaca == Passage(prompt=ALPACA_WITH_INPUT.format(instruction="Add.", input="1 1"), completion="2")


def test_system_prompts() -> None:
    system = {"role": "system", "content": "s"}
    assert read({"messages": [USER, ASSISTANT]}, system_prompt="s").messages == [system, USER, ASSISTANT]
    assert read({"messages": [system, USER, ASSISTANT]}, system_prompt="t").messages[0] == system
    assert read({"system": "s", "conversations": [HUMAN, GPT]}).messages[0] == system


def test_tools_and_weights() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "7", "name": "f"}
    silent = {**ASSISTANT, "weight": 0}
    sample = read({"messages": [USER, call, result, silent], "tools": [{"type": "function"}]})
    assert isinstance(sample, Conversation)
    assert sample.trained == [False, True, False, False] and sample.tools == [{"type": "function"}]
    del call["content"]  # as some exporters leave it
    assert read({"messages": [USER, call, result, silent]}).messages[1]["content"] == ""
    assert sample.messages[1]["tool_calls"] == call["tool_calls"] and "weight" not in sample.messages[3]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": None}, "field messages: is missing"),
        ({"messages": []}, "field messages: is empty"),
        ({"messages": "hello"}, "field messages: is a str, not a list of turns"),
        ({"messages": [USER, "hello"]}, r"field messages\[1\]: is a str, not an object"),
        ({"messages": [{"role": "user"}]}, r"field messages\[0\]\.content: is missing"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"field messages\[1\]\.content: is empty"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, r"field messages\[1\]\.content: is a int"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"field messages\[0\]\.role: is 'bot'; known are system"),
        ({"messages": [ASSISTANT]}, r"field messages\[0\]\.role: assistant stands first"),
        ({"messages": [USER, USER]}, r"field messages\[1\]\.role: user follows user"),
        ({"messages": [USER, {"role": "system", "content": "s"}]}, r"field messages\[1\]\.role: system follows user"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"field messages\[0\]\.content\[0\]: is not a text part",
        ),
        ({"conversations": [{"from": "human"}]}, r"field conversations\[0\]\.value: is missing"),
        ({"prompt": "q", "completion": ""}, "field completion: is empty"),
        ({"prompt": 1, "completion": "a"}, "field prompt: is a int, not a string"),
        ({"instruction": "q", "output": None}, "field output: is missing"),
        ({"text": None}, "field text: is missing"),
    ],
)
def test_what_is_wrong_is_named_by_its_field(fields: dict, problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        read(fields)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "system", "tools"]
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(names, json_values, max_size=4), st.booleans())
def test_any_record_is_read_or_refused(fields: dict, has_template: bool) -> None:
    try:
        sample = read(fields, has_template)
    except RecordError as error:
        assert str(error)
    else:
        assert isinstance(sample, Passage) or any(m["content"] for m in sample.messages)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(json_values, json_values)
def test_equal_keys_are_equal_contents(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (content_key(one) == content_key(other)) == same
