import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowprec.adapter import Lora
from lowprec.checkpoint import atomic_folder
from lowprec.errors import UserError
from lowprec.layers.nf4 import NF4
from lowprec.merge import base_tensors, merge, run
from lowprec.model import Model, load_model
from lowprec.prepare import wrap
from lowprec.testing import ARCHITECTURES, save_tiny, save_tiny_gguf, sqnr_db, tiny_model

IDS = torch.arange(48).reshape(2, 24)
# The built-in documentation, which a user's merge is measured on, takes seconds to collect.
TEXT = (
    "A merged weight is rounded once: 0.1 + 0.2 = 0.30000000000000004, says Python; bf16 keeps 8 bits of 53, no more!"
)


def randomise(model, seed=0):
    """B begins at zero and copies begin as copies: give every trained tensor a change of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.1 if "lora_" in name else 0.05
            parameter.data = parameter.data.float() + scale * torch.randn(parameter.shape, generator=generator)
    return model


def make_adapter(folder, model, base, **options):
    peft = randomise(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | options)))
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(folder, save_embedding_layers=False)
    return peft.eval()


def unmerged(folder, base=None, dtype=torch.float32):
    """Base and adapter by plain PEFT."""
    base = base or json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder).eval()


def stored(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


CASES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {r".*\.1\..*": 7}, "alpha_pattern": {r".*\.0\..*": 3}},
    "bias": {"bias": "all"},
}


@pytest.mark.parametrize(
    "arch, case",
    [(arch, "lora") for arch in ARCHITECTURES]
    + [(arch, case) for arch in ("llama", "gpt2", "phi") for case in CASES if case != "lora"],
)
def test_merging_equals_pefts_own_to_the_last_bit_of_rounding(tmp_path, arch, case):
    """In bf16: each merged weight is PEFT's fp32 sum, rounded once."""
    base = save_tiny(tmp_path / "base", arch, dtype=torch.bfloat16)
    make_adapter(tmp_path / "adapter", tiny_model(arch), base, target_modules="all-linear", **CASES[case])
    result = merge(tmp_path / "adapter", tmp_path / "out", text=TEXT)
    expected = unmerged(tmp_path / "adapter").merge_and_unload(safe_merge=True).state_dict()
    merged = stored(tmp_path / "out")
    assert set(merged) == set(stored(base))
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name
    plain = stored(base)
    changed = [name for name in merged if not torch.equal(merged[name], plain[name])]
    assert len(changed) >= result.num_layers > 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sqnr_db(unmerged(tmp_path / "adapter")(IDS).logits, again(IDS).logits) > 30
    (gap,) = result.differences
    assert gap.num_tokens == len(TEXT) and 0 < gap.largest < 0.1 * gap.largest_logit


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_embeddings_and_head_also_where_they_are_one_tensor(tmp_path, options, tied):
    base = save_tiny(tmp_path / "base", "llama", tie_word_embeddings=tied)
    model = tiny_model("llama", tie_word_embeddings=tied)
    peft = make_adapter(tmp_path / "adapter", model, base, **options)
    result = merge(tmp_path / "adapter", tmp_path / "out", text=TEXT)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(IDS).logits, peft(IDS).logits, atol=2e-5, rtol=1e-5)
    assert result.differences[0].largest < 1e-4
    one_tensor = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert not one_tensor and merged.config.tie_word_embeddings is False
    assert any("were one tensor" in note for note in result.notes) == tied


def test_tied_embeddings_that_no_adapter_touches_stay_tied(tmp_path):
    base = save_tiny(tmp_path / "base", "gemma")
    make_adapter(tmp_path / "adapter", tiny_model("gemma"), base, target_modules="all-linear")
    merge(tmp_path / "adapter", tmp_path / "out", text=TEXT)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight
    assert "lm_head.weight" not in stored(tmp_path / "out")


def test_shards_in_and_out_and_one_shard_in_memory(tmp_path, monkeypatch):
    base = tmp_path / "base"
    tiny_model("qwen3").save_pretrained(base, max_shard_size="100KB")
    save_tiny(tmp_path / "tokenizer", "qwen3")
    for file in (tmp_path / "tokenizer").glob("*token*"):
        shutil.copy(file, base)
    assert len(list(base.glob("model-*.safetensors"))) > 2
    peft = make_adapter(tmp_path / "adapter", tiny_model("qwen3"), base, target_modules="all-linear")
    monkeypatch.setattr(run, "MAX_SHARD_BYTES", 120_000)
    largest = []
    write = run.save_file
    monkeypatch.setattr(
        run, "save_file", lambda t, *a, **k: (largest.append(sum(x.nbytes for x in t.values())), write(t, *a, **k))
    )
    merge(tmp_path / "adapter", tmp_path / "out", text=TEXT)
    assert len(largest) == len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2 and max(largest) <= 120_000
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(IDS).logits, peft(IDS).logits, atol=2e-5, rtol=1e-5)
    index = json.loads((tmp_path / "out" / base_tensors.INDEX).read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_checkpoints_without_the_models_prefix(tmp_path):
    """Old GPT-2 files name their tensors as the bare transformer does."""
    base = save_tiny(tmp_path / "base", "gpt2")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(base / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    peft = make_adapter(
        tmp_path / "adapter", tiny_model("gpt2"), base, target_modules="all-linear", fan_in_fan_out=True
    )
    merge(tmp_path / "adapter", tmp_path / "out", text=TEXT)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(IDS).logits, peft(IDS).logits, atol=2e-5, rtol=1e-5)


def test_a_gguf_base(tmp_path):
    gguf = save_tiny_gguf(tmp_path / "tiny.gguf")
    model = load_model(Model(model_name_or_path=str(gguf)))
    make_adapter(tmp_path / "adapter", model, gguf, target_modules="all-linear")
    result = merge(tmp_path / "adapter", tmp_path / "out")
    plain = load_model(Model(model_name_or_path=str(gguf))).float()
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload(safe_merge=True).state_dict()
    merged = stored(tmp_path / "out")
    assert all(torch.equal(t, expected[name].bfloat16()) for name, t in merged.items())
    assert result.dtypes == ["bfloat16"] and result.differences[0].largest < 0.1
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def write_run(folder, base, adapter, weights):
    """A run folder as training leaves it."""
    from lowprec.config import resolve

    shutil.copytree(adapter, folder / "final")
    recipe, _ = resolve("lora", [f"model.model_name_or_path={base}", "data.path=python_docs", f"weights={weights}"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder


def test_a_qlora_run_merges_into_the_original_files_and_says_so(tmp_path):
    base = save_tiny(tmp_path / "base", "llama", dtype=torch.bfloat16)
    model = load_model(Model(model_name_or_path=str(base)))
    wrap(model, NF4(), frozen=True)
    options = Lora(r=4)
    peft = randomise(options.attach(model))
    options.save(peft, tmp_path / "adapter", Model(model_name_or_path=str(base)))
    result = merge(write_run(tmp_path / "run", base, tmp_path / "adapter", "nf4"), tmp_path / "out", text=TEXT)
    original, trained = result.differences
    assert original.against == "base + adapter" and trained.against == "nf4 base + adapter, as trained"
    assert 3 * original.root_mean_square < trained.root_mean_square
    assert any("nf4" in note for note in result.notes)
    expected = unmerged(tmp_path / "adapter", base).merge_and_unload(safe_merge=True).state_dict()
    assert all(torch.equal(t, expected[name].bfloat16()) for name, t in stored(tmp_path / "out").items())
    console = Console(record=True, width=150)
    result.render(console)
    text = console.export_text()
    assert (
        f"{trained.largest:.4f}" in text and "nf4 base + adapter" in text and "layers updated" in text and "14" in text
    )


def test_dtype_and_base_can_be_named(tmp_path):
    save_tiny(tmp_path / "base", "llama")
    make_adapter(tmp_path / "adapter", tiny_model("llama"), "nowhere/to-be-found", target_modules="all-linear")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"), dtype="fp16", text=TEXT)
    assert {t.dtype for t in stored(tmp_path / "out").values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float16


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        merge(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_cannot_be_merged_says_why_and_writes_nothing(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base", "llama")
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    make_adapter(adapter, tiny_model("llama"), base, target_modules="all-linear")
    assert "no adapter" in refused(tmp_path, out) and "not a folder" in refused(tmp_path / "x", out)
    assert "whole model" in refused(base, out)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("")
    assert "has not finished" in refused(tmp_path / "unfinished", out)
    assert "dtype=int4" in refused(adapter, out, dtype="int4")

    out.mkdir()
    (out / "precious").write_text("")
    assert "not empty" in refused(adapter, out) and (out / "precious").exists()
    (out / "precious").unlink()

    wide = save_tiny(tmp_path / "wide", "llama", hidden_size=128)
    assert "made for another model" in refused(adapter, out, base=str(wide)) and "--base" in refused(
        adapter, out, base=str(wide)
    )
    other = save_tiny(tmp_path / "other", "gpt2")
    assert "made for another model" in refused(adapter, out, base=str(other))
    deep = save_tiny(tmp_path / "deep", "llama", num_hidden_layers=3)
    make_adapter(tmp_path / "short", tiny_model("llama"), base, target_modules=["q_proj"])
    assert "its file has no lora_A" in refused(tmp_path / "short", out, base=str(deep))
    assert "--base" in refused(adapter, out, base=str(tmp_path / "missing"))

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 100))
    assert "bytes" in refused(adapter, out)
    monkeypatch.undo()

    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(k for k in tensors if "lora_B" in k)
    save_file(tensors | {name: tensors[name] * float("nan")}, adapter / "adapter_model.safetensors")
    assert "NaN" in refused(adapter, out)
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 99)
    assert "damaged" in refused(adapter, out)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "pickled" in refused(adapter, out)
    assert list(out.iterdir()) == [] and not list(tmp_path.glob(".writing*"))


def test_a_4bit_base_asks_for_the_16bit_one(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    make_adapter(tmp_path / "adapter", tiny_model("llama"), base, target_modules="all-linear")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    assert "16-bit model" in refused(tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_that_is_not_as_its_manifest_says_is_refused(tmp_path):
    with atomic_folder(tmp_path / "final") as writing:
        (writing / "adapter_config.json").write_text("{}")
        (writing / "adapter_model.safetensors").write_bytes(bytes(100))
    (tmp_path / "final" / "adapter_model.safetensors").write_bytes(bytes(99) + b"x")
    with pytest.raises(UserError, match="is damaged: .*does not have the checksum"):
        merge(tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
