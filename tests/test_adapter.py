import copy
import json

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from lowprec.adapter import Lora, NoAdapter
from lowprec.errors import UserError
from lowprec.layers.nf4 import NF4
from lowprec.model import Model
from lowprec.testing import ARCHITECTURES, save_tiny, sqnr_db, tiny_model

IDS = torch.arange(24).reshape(2, 12)


def to_nf4(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, NF4().convert(module, frozen=True))
    return model


def loss_of(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=IDS, labels=IDS).loss


def perturb(model, seed=0):
    """Give every trained tensor a value of its own: B starts at zero, and a zero hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "arch, quantised", [(arch, False) for arch in ARCHITECTURES] + [("llama", True), ("phi", True), ("opt", True)]
)
def test_a_step_trains_the_adapter_alone_in_fp32_and_lowers_the_loss(arch, quantised):
    model = tiny_model(arch, dtype=torch.bfloat16)
    model = to_nf4(model) if quantised else model
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    peft = Lora(r=8).attach(model)
    peft.train()
    trained = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3)
    losses = []
    for _ in range(4):
        loss = loss_of(peft)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in peft.get_base_model().named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name


def test_products_run_in_the_model_dtype_under_autocast():
    peft = Lora().attach(tiny_model("llama", dtype=torch.bfloat16))
    dtypes = []
    for name, module in peft.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))
    loss_of(peft)
    assert len(dtypes) == 2 * 14 and set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_reach_every_adapter_also_with_checkpointing(quantised, use_dora):
    def gradients(checkpointing):
        model = tiny_model("llama", dtype=torch.bfloat16)
        model = to_nf4(model) if quantised else model
        torch.manual_seed(0)
        peft = perturb(Lora(use_dora=use_dora).attach(model)).train()
        if checkpointing:
            peft.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(peft).backward()
        return {n: p.grad for n, p in peft.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert all(g is not None and g.abs().sum() > 0 for g in plain.values())
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain)


def test_peft_takes_its_4bit_layer_and_dora_decodes_the_weight():
    model = to_nf4(tiny_model("qwen3", dtype=torch.bfloat16))
    decoded = model.model.layers[0].mlp.up_proj.dequantized_weight().float()
    peft = Lora(use_dora=True).attach(model)
    layer = peft.get_base_model().model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and isinstance(layer.base_layer, bnb.nn.Linear4bit)
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert sqnr_db(decoded.norm(dim=1), magnitude) > 40


def test_modules_to_save_are_trained_in_fp32_and_compute_in_the_model_dtype():
    peft = Lora(modules_to_save=["lm_head", "embed_tokens", "norm"]).attach(tiny_model("llama", dtype=torch.bfloat16))
    trained = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    outputs = {}
    base = peft.get_base_model()
    for name, module in [("embed", base.model.embed_tokens), ("norm", base.model.norm), ("head", base.lm_head)]:
        module.register_forward_hook(lambda _m, _i, output, name=name: outputs.update({name: output.dtype}))
    loss_of(peft.train()).backward()
    assert outputs == dict.fromkeys(("embed", "norm", "head"), torch.bfloat16)
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize(
    "options, count",
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*layers\.1\.mlp\..*_proj"}, 3),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, 1),
    ],
)
def test_targets(options, count):
    peft = Lora(**options).attach(tiny_model("llama"))
    assert sum(n.endswith("lora_A.default") for n, _ in peft.named_modules()) == count


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["q_proj", "vproj"]}, "target_modules: 'vproj' matches no layer.*Did you mean v_proj"),
        ({"target_modules": ["c_attn"]}, "There are: down_proj, embed_tokens, gate_proj, k_proj, lm_head"),
        ({"target_modules": ".*query"}, "target_modules: '.*query' matches no layer"),
        ({"target_modules": "*q"}, "no regular expression"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed'.*Did you mean lm_head"),
    ],
)
def test_names_that_match_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message.replace(".*query", r"\.\*query")):
        Lora(**options).attach(tiny_model("llama"))


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"lora_dropout": 1.0}, {"bias": "some"}, {"target_modules": []}, {"target_modules": 3}]
)
def test_values_out_of_range_name_their_key(options):
    with pytest.raises(UserError, match=f"adapter.{next(iter(options))}"):
        Lora(**options)


def test_rank_and_alpha_patterns_and_rslora():
    peft = Lora(r=4, lora_alpha=8, rank_pattern={"q_proj": 9}, alpha_pattern={"q_proj": 27}, use_rslora=True)
    layer = peft.attach(tiny_model("llama")).get_base_model().model.layers[1].self_attn
    assert layer.q_proj.lora_A["default"].weight.shape == (9, 64) and layer.q_proj.scaling["default"] == 9
    assert layer.k_proj.lora_A["default"].weight.shape == (4, 64) and layer.k_proj.scaling["default"] == 4


def test_no_adapter_is_the_model_itself(tmp_path):
    model = tiny_model("opt")
    assert NoAdapter().attach(model) is model
    NoAdapter().save(model, tmp_path, Model(model_name_or_path="x"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_saved_adapter_loads_in_plain_peft(tmp_path, monkeypatch, arch):
    base = save_tiny(tmp_path / "base", arch)
    monkeypatch.chdir(tmp_path)
    head = ["lm_head"] if arch == "llama" else None
    options = Lora(modules_to_save=head, use_dora=True)
    peft = perturb(options.attach(tiny_model(arch)))
    options.save(peft, tmp_path / "adapter", Model(model_name_or_path="base", revision="main"))
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files and not any(f.endswith(".bin") for f in files)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["revision"] == "main"
    again = PeftModel.from_pretrained(tiny_model(arch), tmp_path / "adapter")
    assert torch.equal(again(input_ids=IDS).logits, copy.deepcopy(peft).eval()(input_ids=IDS).logits)
