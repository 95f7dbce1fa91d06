"""``wrap`` on whole models: what is converted and why not, what is saved, training through PEFT, Trainer and TRL."""

import copy
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lowprec.errors import UserError
from lowprec.layers.auto import Auto
from lowprec.layers.eight_bit_linear import FrozenEightBitLinear, TrainedEightBitLinear
from lowprec.layers.eight_bit_schemes import Fp8
from lowprec.prepare import as_scheme, find_linears, wrap
from lowprec.testing import ARCHITECTURES, tiny_model, tiny_tokenizer

SCHEMES = ("fp8", "fp8_hadamard", "int8_hadamard")


def ids(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=ids(), labels=ids()).loss


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_architecture(arch, frozen):
    model = tiny_model(arch)
    linears = len([m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"])
    expected = loss(model).item()
    report = wrap(model, "int8_hadamard", frozen=frozen)
    kind = FrozenEightBitLinear if frozen else TrainedEightBitLinear
    assert report.counts() == {"int8_hadamard": linears - 1, "bf16": 1}
    assert sum(isinstance(m, kind) for m in model.modules()) == linears - 1
    found = loss(model)
    assert abs(found.item() - expected) < 2e-3
    found.backward()
    embeddings = model.get_input_embeddings().weight
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("arch", ["gpt2", "gemma"])
def test_a_trained_model_is_saved_as_an_ordinary_checkpoint(scheme, arch, tmp_path):
    model = tiny_model(arch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrap(model, scheme)
    loss(model).backward()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(files[name], state[name]) for name in files)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert abs(loss(plain).item() - loss(model).item()) < 1e-2
    twin = tiny_model(arch, seed=1)
    wrap(twin, scheme)
    twin.load_state_dict(state)
    assert torch.equal(loss(twin), loss(model))


def test_tied_embeddings_stay_tied():
    model = tiny_model("llama", tie_word_embeddings=True)
    wrap(model, "fp8", rules={"lm_head": "bf16"})
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_rules_decide_before_the_defaults():
    model = tiny_model("llama")
    rules = {"*.0.mlp.down_proj": "bf16", "*.down_proj": "int8_hadamard", "lm_head": Fp8()}
    report = wrap(model, "fp8_hadamard", rules=rules)
    schemes = {row.name: row.scheme for row in report.rows}
    assert schemes["model.layers.0.mlp.down_proj"] == "bf16"
    assert schemes["model.layers.1.mlp.down_proj"] == "int8_hadamard"
    assert schemes["lm_head"] == "fp8" and schemes["model.layers.0.mlp.up_proj"] == "fp8_hadamard"
    with pytest.raises(UserError, match="matches no linear layer.*down_proj"):
        wrap(tiny_model("llama"), "fp8", rules={"*.down_prj": "bf16"})


def test_mistakes_are_named():
    with pytest.raises(UserError, match="Did you mean 'fp8'"):
        wrap(tiny_model("llama"), "fp88")
    with pytest.raises(UserError, match="converted no layer.*multiples of 16"):
        wrap(nn.Sequential(nn.Linear(20, 20)), "fp8")
    with pytest.raises(UserError, match="already"):
        model = tiny_model("llama")
        wrap(model, "fp8")
        wrap(model, "fp8")
    with pytest.warns(UserWarning, match="Only"):
        wrap(tiny_model("llama"), "fp8", rules={"*.mlp.*": "bf16"})


def test_frozen_follows_each_weight():
    model = tiny_model("llama")
    model.model.layers[0].requires_grad_(False)
    wrap(model, "fp8")
    assert isinstance(model.model.layers[0].mlp.up_proj, FrozenEightBitLinear)
    assert isinstance(model.model.layers[1].mlp.up_proj, TrainedEightBitLinear)


def test_report_counts_shares_and_prints():
    model = tiny_model("llama")
    total = sum(p.numel() for p in model.parameters())
    report = wrap(model, "fp8_hadamard")
    mine = sum(m.weight.numel() for m in model.modules() if isinstance(m, TrainedEightBitLinear))
    assert report.parameter_share == pytest.approx(mine / total)
    assert report.flop_share == pytest.approx(mine / (mine + model.lm_head.weight.numel()))
    text = str(report)
    assert "model.layers.*.mlp.up_proj" in text and "128x64" in text and "output head" in text
    assert report.to_dict()["counts"] == report.counts() and len(report.to_dict()["linears"]) == 15
    assert report.rows[0].rotation_block == 64 and report.rows[0].shape == [64, 64]


def test_fused_experts_and_routers_are_listed():
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)  # noqa: C408
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=64, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, **shape)
    )
    with pytest.warns(UserWarning, match="Only"):
        report = wrap(model, "fp8")
    experts = [row for row in report.rows if "experts" in row.name]
    assert [row.shape for row in experts] == [[4, 64, 32], [4, 32, 32]]
    share = experts[0].parameters / sum(p.numel() for p in model.parameters())
    assert f"{share:.1%} of the model's parameters" in experts[0].reason
    assert all("grouped" in row.reason and row.flops_per_token == row.parameters for row in experts)


def test_all_processes_take_the_choice_of_the_first(tmp_path, monkeypatch):
    """As seen by a second process, which times the layers otherwise (two real ones: 55 s on two busy cores)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def ms(fast):
        monkeypatch.setattr(
            "lowprec.layers.auto.milliseconds_of", lambda layer, *_: 1.0 if type(layer).__name__ == fast else 2.0
        )

    sent = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, src: sent.append(copy.deepcopy(box[0])))
    ms("TrainedEightBitLinear")
    assert wrap(tiny_model("llama"), Auto(tokens=64)).counts() == {"fp8": 14, "bf16": 1}
    ms("Linear")
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, src: box.__setitem__(src, sent[0]))
    assert wrap(tiny_model("llama"), Auto(tokens=65)).counts() == {"fp8": 14, "bf16": 1}


@pytest.mark.parametrize("weights", ["nf4", "fp8"])
def test_a_converted_layer_frees_its_16_bit_weight_before_the_next_is_moved(weights):
    """Else a device would hold the whole 16-bit model at the end, and an 8B model would not load on a small card."""
    model, alive, scheme = tiny_model("llama"), [], type(as_scheme(weights))
    plain = [weakref.ref(linear) for _, linear in find_linears(model)]

    class Watched(scheme):
        def convert(self, linear, frozen):
            alive.append(sum(reference() is not None for reference in plain))
            return scheme.convert(self, linear, frozen)

    wrap(model, Watched(), frozen=True)
    assert alive == list(range(len(plain), 1, -1))  # the output head stays


def test_auto_keeps_16_bits_where_8_do_not_pay_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model("llama")
    seconds = {"bf16": 3.0, "TrainedEightBitLinear": 1.0}
    timed = []

    def pretend(layer, tokens, frozen, in_graphs):
        timed.append(type(layer).__name__)
        return seconds.get(type(layer).__name__, seconds["bf16"]) + 0.01 * len(timed)

    monkeypatch.setattr("lowprec.layers.auto.milliseconds_of", pretend)
    batch = {"input_ids": ids()}
    report = wrap(model, Auto(tokens=64), calibration=batch)
    assert report.counts() == {"fp8": 14, "bf16": 1} and "dB" in report.rows[0].reason
    assert all(p.grad is None for p in model.parameters())
    count = len(timed)
    assert wrap(tiny_model("llama"), Auto(tokens=64)).counts() == {"fp8": 14, "bf16": 1}
    assert len(timed) == count  # the verdicts were read from the file
    strict = wrap(tiny_model("llama"), Auto(tokens=64, min_sqnr_db=32), calibration=batch)
    assert strict.counts() == {"int8_hadamard": 14, "bf16": 1}  # e4m3's noise is 28 dB
    seconds["TrainedEightBitLinear"] = 9.0
    slow = wrap(tiny_model("llama"), Auto(tokens=65))
    assert slow.counts() == {"bf16": 15} and "16 bits are best" in slow.rows[0].reason and slow.notes


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora_over_a_frozen_base(scheme, dora):
    torch.manual_seed(0)
    model = tiny_model("llama").bfloat16()
    model.requires_grad_(False)
    base = copy.deepcopy(model)
    wrap(model, scheme, frozen=True)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora))
    assert abs(loss(model).item() - loss(base).item()) < 2e-2
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(loss(model))
        losses[-1].backward()
        assert all(p.grad is not None for p in adapters.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(UserError, match="lowprec merge"):
        model.merge_and_unload()


def rows() -> Dataset:
    tokens = ids(16).tolist()
    return Dataset.from_list([{"input_ids": t, "labels": t, "attention_mask": [1] * len(t)} for t in tokens])


def test_transformers_trainer(tmp_path):
    model = tiny_model("llama")
    wrap(model, "int8_hadamard")
    before = loss(model).item()
    arguments = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True, seed=0,
        gradient_checkpointing=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert loss(model).item() < before - 0.1
    assert abs(loss(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")).item() - loss(model).item()) < 0.05


def test_trl_sft_trainer_with_lora(tmp_path):
    trl = pytest.importorskip("trl")
    model = tiny_model("llama")
    wrap(model, "fp8", frozen=True)
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, max_length=24, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    data = Dataset.from_list([{"text": "hello world, hello world"}] * 8)
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=data, processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    history = trainer.train()
    assert history.training_loss > 0
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and logged[-1] < logged[0]
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert moved


def test_a_name_in_place_of_a_model_is_told():
    with pytest.raises(UserError, match="takes a loaded model"):
        wrap("./tiny", "fp8")
