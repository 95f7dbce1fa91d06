"""The recipe groups ``optimizer`` and ``state_store``, and the schedules."""

import pytest
import torch
from torch import nn

from lowprec.errors import UserError
from lowprec.optim import AdamW
from lowprec.optim.options import (
    AdamW8bitOptions,
    AdamWOptions,
    CpuStore,
    GpuStore,
    PagedAdamW8bitOptions,
    PagedAdamWOptions,
    SsdStore,
    build_schedule,
    follows_loss,
    schedule_names,
)
from lowprec.option import option_names
from lowprec.testing import tiny_model

BITSANDBYTES = (AdamW8bitOptions, PagedAdamWOptions, PagedAdamW8bitOptions)


def test_the_choices():
    assert option_names("optimizer") == ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
    assert option_names("state_store") == ["cpu", "gpu", "ssd"]


def test_adamw_is_built_with_the_recipes_values_and_decays_no_bias_or_norm():
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    options = AdamWOptions(
        learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, state_dtype="int8"
    )
    optimizer = options.build(model, CpuStore())
    assert isinstance(optimizer, AdamW)
    decayed, plain = optimizer.param_groups
    assert (decayed["lr"], decayed["betas"], decayed["eps"], decayed["weight_decay"]) == (3e-4, (0.8, 0.95), 1e-6, 0.1)
    assert plain["weight_decay"] == 0 and all("norm" in name for name in plain["param_names"])
    names = decayed["param_names"] + plain["param_names"]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert optimizer.statistics()["state_store"] == "cpu"


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="adapter=lora"):
        AdamWOptions().build(tiny_model("llama").requires_grad_(False), GpuStore())


@pytest.mark.parametrize("options", BITSANDBYTES)
def test_bitsandbytes_takes_no_other_store(options):
    class Recipe:
        state_store = SsdStore(path="/nowhere")

    with pytest.raises(UserError, match=rf"optimizer={options.option_name} .*state_store=ssd"):
        options().check(Recipe)
    Recipe.state_store = GpuStore()
    options().check(Recipe)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("options", BITSANDBYTES)
def test_bitsandbytes_is_built_by_its_name(options):
    optimizer = options().build(nn.Sequential(nn.Linear(4, 4)), GpuStore())
    assert type(optimizer).__name__ == options.class_name


def test_warnings():
    model = nn.Linear(1000, 1000)
    assert AdamWOptions().warnings(model, GpuStore()) == []
    (small,) = AdamWOptions().warnings(model, SsdStore(path="x"))
    assert "1,001,000 parameters" in small and "state_store=gpu" in small
    assert AdamW8bitOptions().warnings(model, GpuStore()) == []
    model.bfloat16()
    (rounded,) = AdamWOptions(master="none").warnings(model, GpuStore())
    assert "optimizer.master=split" in rounded
    (lost,) = AdamW8bitOptions().warnings(model, GpuStore())
    assert "no fp32 master" in lost


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdamWOptions(lr_scheduler_type="cosinus"), "cosine, cosine_with_restarts"),
        (lambda: AdamWOptions(warmup_ratio=2.0), "warmup_ratio=2.0"),
        (lambda: AdamWOptions(learning_rate=-1.0), "learning_rate=-1.0"),
        (lambda: AdamWOptions(adam_beta2=1.0), "adam_beta2=1.0"),
        (lambda: AdamWOptions(state_dtype="fp8"), "fp32, bf16, int8"),
        (lambda: AdamWOptions(master="half"), "split, fp32, none"),
        (lambda: SsdStore(), "state_store.path"),
        (lambda: SsdStore(path="x", pinned_gib=0.0), "pinned_gib"),
        (lambda: SsdStore(path="x", drive_tbw=-1.0), "drive_tbw"),
        (lambda: SsdStore(path="x", reserve_checkpoints=-1), "reserve_checkpoints"),
    ],
)
def test_mistakes_name_their_key(make, words):
    with pytest.raises(UserError, match=words):
        make()


EXTRA = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize("name", schedule_names())
def test_every_schedule_of_transformers(name):
    options = AdamWOptions(
        learning_rate=1e-3, lr_scheduler_type=name, warmup_ratio=0.2, lr_scheduler_kwargs=EXTRA.get(name, {})
    )
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = AdamW([parameter], lr=1e-3)
    schedule = build_schedule(optimizer, options, 10)
    rates = []
    for _ in range(10):
        parameter.grad = torch.ones(3)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(*([1.0] if follows_loss(schedule) else []))
    without_warmup = name == "constant" or follows_loss(schedule)
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[0] == 1e-3 if without_warmup else rates[0] < rates[1], rates


def test_schedule_mistakes():
    optimizer = AdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(UserError, match=r"lr_scheduler_kwargs=.*'foo'.* takes num_cycles"):
        build_schedule(optimizer, AdamWOptions(lr_scheduler_type="cosine", lr_scheduler_kwargs={"foo": 1}), 10)
    with pytest.raises(UserError, match="warmup_steps=20"):
        build_schedule(optimizer, AdamWOptions(warmup_steps=20), 10)


def test_the_warning_of_small_states_on_a_disk_counts_what_is_stored(tmp_path):
    model = nn.Linear(1024, 1024, bias=False).to(torch.bfloat16)
    for state_dtype, master, mib in (("fp32", "fp32", "12"), ("int8", "split", "4"), ("fp32", "split", "10")):
        options = AdamWOptions(state_dtype=state_dtype, master=master)
        [note] = options.warnings(model, SsdStore(path=str(tmp_path)))
        assert f"have about {mib} MiB of states" in note
