"""The loss lies on the answers and on the tokens that end them, and on nothing else, in templates of many kinds."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lowprec.data.chat import IGNORE, Encoder, Tokens
from lowprec.data.layouts import Conversation, Passage
from lowprec.data.records import RecordError
from lowprec.errors import UserError
from lowprec.testing import CHATML

START, END = "<|im_start|>", "<|im_end|>"

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}", 1
)
# As in Qwen3: the thinking of an answer is shown only as long as no user turn follows.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '</think>\n' }}"
    "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Announces another text than the answer has.
CONTRADICTING = REWRITING.replace(
    "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\nSure: ' }}{% endif %}"
)
# As in Gemma: other names for the roles, and no system turn.
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# Without any token that ends a turn.
ENDLESS = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def chat(*turns: str, system: str | None = None) -> Conversation:
    """Turns of user and assistant in alternation."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return Conversation(messages=messages, trained=[m["role"] == "assistant" for m in messages])


def encoder(tokenizer: PreTrainedTokenizerBase, template: str | None = CHATML, **options: Any) -> Encoder:
    tokenizer.chat_template = template
    return Encoder(tokenizer, **options)


def trained(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[str]:
    """The texts of the runs of trained tokens."""
    runs: list[list[int]] = []
    previous = IGNORE
    for label in tokens.labels:
        if label != IGNORE:
            if previous == IGNORE:
                runs.append([])
            runs[-1].append(label)
        previous = label
    assert all(label in (IGNORE, token) for label, token in zip(tokens.labels, tokens.input_ids, strict=True))
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_WITHOUT_END, STRICT])
def test_loss_on_every_answer_and_its_end(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    (tokens,) = encoder(tokenizer, template).encode(chat("one?", "yes.", "two? ü", "né 🙂"))
    assert trained(tokenizer, tokens) == ["yes." + END, "né 🙂" + END]
    text = tokenizer.decode(tokens.input_ids[: tokens.prompt_length])
    assert text.endswith((START + "assistant\n", START + "model\n")) and "yes" not in text
    assert text.count("<|endoftext|>") == (template == STRICT)  # one BOS where the template writes one


def test_system_and_trailing_user_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    (tokens,) = encoder(tokenizer).encode(chat("one?", "yes.", "and two?", system="Be short."))
    text = tokenizer.decode(tokens.input_ids)
    assert text == f"{START}system\nBe short.{END}\n{START}user\none?{END}\n{START}assistant\nyes.{END}\n"
    assert trained(tokenizer, tokens) == ["yes." + END]


def test_an_answer_that_is_not_to_be_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = chat("one?", "bad.", "two?", "good.")
    conversation.trained[1] = False
    for template in (CHATML, MARKED):
        (tokens,) = encoder(tokenizer, template).encode(conversation)
        assert trained(tokenizer, tokens) == ["good." + END]
        assert "bad." in tokenizer.decode(tokens.input_ids)


def test_a_rewriting_template_trains_each_answer_in_the_text_it_was_asked_in(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    conversation = chat("one?", "yes.", "two?", "no.")
    conversation.messages[1]["reasoning_content"] = "hm\n"
    encoded = encoder(tokenizer, REWRITING).encode(conversation)
    assert [trained(tokenizer, tokens) for tokens in encoded] == [
        [f"<think>\nhm\n</think>\nyes.{END}"],
        [f"<think>\n</think>\nno.{END}"],
    ]
    assert "hm" not in tokenizer.decode(encoded[1].input_ids)  # the template drops earlier thinking


def test_a_rewriting_template_leaves_single_answers_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(encoder(tokenizer, REWRITING).encode(chat("one?", "yes."))) == 1


def test_a_template_whose_prompt_is_no_prefix_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RecordError, match=r"messages\[1\].*generation"):
        encoder(tokenizer, CONTRADICTING).encode(chat("one?", "yes."))


def test_the_template_s_own_refusal_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RecordError, match="System role not supported"):
        encoder(tokenizer, STRICT).encode(chat("one?", "yes.", system="x"))


def test_a_template_without_end_of_turn_gets_an_end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    (tokens,) = encoder(tokenizer, ENDLESS).encode(chat("one?", "yes."))
    assert trained(tokenizer, tokens) == ["yes.\n\n" + END]


def test_train_on_prompt_is_everything_but_the_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    (tokens,) = encoder(tokenizer, train_on_prompt=True).encode(chat("one?", "yes.", "more?"))
    assert tokens.labels == [IGNORE, *tokens.input_ids[1:]]
    assert tokens.num_trained() == len(tokens.input_ids) - 1
    assert "more?" in tokenizer.decode(tokens.input_ids)
    (whole,) = encoder(tokenizer, REWRITING, train_on_prompt=True).encode(chat("one?", "yes.", "two?", "no."))
    assert whole.num_trained() == len(whole.input_ids) - 1


def test_passages_work_without_a_template_and_learn_to_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    (tokens,) = encoder(tokenizer, None).encode(Passage(prompt="2 + 2 =", completion=" 4"))
    assert trained(tokenizer, tokens) == [" 4" + END]
    assert tokenizer.decode(tokens.input_ids[: tokens.prompt_length]) == "2 + 2 ="
    (text,) = encoder(tokenizer, None).encode(Passage(completion="abc"))
    assert trained(tokenizer, text) == ["bc" + END] and text.prompt_length == 0


def test_conversations_without_a_template_name_the_remedy(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"data\.chat_template.*-Instruct"):
        encoder(tokenizer, None).encode(chat("one?", "yes."))


def test_a_template_of_the_user(tokenizer: PreTrainedTokenizerBase, tmp_path: Any) -> None:
    (tmp_path / "chat.jinja").write_text(STRICT)
    Encoder(tokenizer, chat_template=str(tmp_path / "chat.jinja"))
    assert tokenizer.chat_template == STRICT
    with pytest.raises(UserError, match=r"data\.chat_template=.*none\.jinja cannot be read"):
        Encoder(tokenizer, chat_template=str(tmp_path / "none.jinja"))


def test_no_second_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenizers that put a BOS before every text must not put one before a rendered conversation's own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    bos = tokenizer.bos_token_id
    (rendered,) = encoder(tokenizer, STRICT).encode(chat("one?", "yes."))
    (plain,) = encoder(tokenizer, None).encode(Passage(prompt="a", completion="b"))
    (written,) = encoder(tokenizer, None).encode(Passage(prompt="<|endoftext|>a", completion="b"))
    for tokens in (rendered, plain, written):
        assert tokens.input_ids.count(bos) == 1 and tokens.input_ids[0] == bos
    assert trained(tokenizer, plain) == ["b" + END]


@pytest.mark.smollm2
def test_the_real_tokenizer(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = smollm2_tokenizer
    encoder = Encoder(tokenizer)
    (tokens,) = encoder.encode(chat("Who?", "You.", "Really?", "Yes"))
    assert trained(tokenizer, tokens) == ["You.<|im_end|>", "Yes<|im_end|>"]
    assert tokenizer.decode(tokens.input_ids).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    # The prompt is what the model is asked at inference, token for token.
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
    assert tokens.input_ids[: tokens.prompt_length] == asked["input_ids"]
    (passage,) = encoder.encode(Passage(prompt="The capital of France is", completion=" Paris"))
    assert trained(tokenizer, passage) == [" Paris<|im_end|>"]
