import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowprec.testing import ARCHITECTURES, VOCAB_SIZE, save_tiny, sqnr_db, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_tiny_model_runs_in_every_dtype_and_depends_on_its_seed_alone(arch):
    ids = torch.arange(24).reshape(2, 12)
    logits = tiny_model(arch)(ids).logits
    assert logits.shape == (2, 12, VOCAB_SIZE) and logits.isfinite().all()
    before = torch.get_rng_state()
    assert torch.equal(tiny_model(arch)(ids).logits, logits)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(tiny_model(arch, seed=1)(ids).logits, logits)
    assert {p.dtype for p in tiny_model(arch, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [True, False])
def test_tying_can_be_chosen(tied):
    for arch in ARCHITECTURES:
        model = tiny_model(arch, tie_word_embeddings=tied)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied, arch


def test_a_saved_folder_loads_in_plain_transformers(tmp_path):
    folder = save_tiny(tmp_path / "tiny", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, tiny_model("qwen3")(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= VOCAB_SIZE
    text = "naïve 日本 text\n\twith spaces "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids == tiny_tokenizer().apply_chat_template(chat, return_dict=False)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") and ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_sqnr():
    reference = torch.tensor([3.0, 4.0])
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(reference, reference + torch.tensor([0.3, 0.4])) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(reference, torch.tensor([3.0, math.nan])) == -math.inf
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
