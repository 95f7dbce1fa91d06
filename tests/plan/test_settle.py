"""What the two ``auto`` of activations and graphs are settled to: by memory, by what can be recorded, by padding."""

from dataclasses import replace

import pytest
import torch

import lowprec
from lowprec.config import resolve
from lowprec.machine import named_card
from lowprec.plan import Planner, predict
from lowprec.plan.predict import GIB
from lowprec.plan.search import advice
from lowprec.plan.settle import FOR_GRAPHS, settle, settle_on, settled
from lowprec.plan.step import TracedRecipe
from lowprec.testing import tiny_model

CUDA = torch.device("cuda")
BOTH = ("train.gradient_checkpointing=auto", "train.cuda_graphs=auto")
CARD = replace(named_card("H100"), host_us=50.0)


@pytest.fixture
def config():
    return tiny_model("llama", num_hidden_layers=7, hidden_size=256, intermediate_size=512).config


@pytest.fixture
def planner(config):
    return Planner(config, CARD)


def recipe_of(*overrides, name="lora"):
    given = ["model.model_name_or_path=./nowhere", "data.path=none", "model.dtype=bf16", "data.max_length=512"]
    keys = dict(item.split("=", 1) for item in (*given, *overrides))
    return resolve(name, [f"{key}={value}" for key, value in keys.items()])[0]


def need(planner, policy, graphs, *more):
    keys = (f"train.gradient_checkpointing={policy}", f"train.cuda_graphs={graphs}", *more)
    return planner.predict(recipe_of(*keys)).total / GIB


def told(choice):
    return choice.policy, choice.graphs


def test_both_are_tried_from_the_fastest_on(planner):
    chance = torch.get_rng_state()
    recipe, room = recipe_of(*BOTH), 1.001 / FOR_GRAPHS
    none, full = (need(planner, policy, True) * room for policy in ("none", "full"))
    assert full < none
    assert told(settle(planner, recipe, none)) == ("none", True)
    assert told(settle(planner, recipe, full)) == ("full", True), "selective has no graphs"
    with_graphs = min(need(planner, policy, True) for policy in ("full", "offload"))
    tight = settle(planner, recipe, with_graphs / FOR_GRAPHS - 0.001)
    assert not tight.graphs and f"more than 90% of the {with_graphs / FOR_GRAPHS:.1f} free" in tight.no_graphs
    assert tight.policy in ("none", "selective") and tight.why.endswith("GiB are predicted"), "a policy that fits"
    nothing = settle(planner, recipe, 0.001)
    assert told(nothing) == ("offload", False) and nothing.why.endswith("more than the 0.0 that there are")
    unknown = settle(planner, recipe, None)
    assert told(unknown) == ("full", False) and unknown.no_graphs == unknown.why == "the device's memory is not known"
    assert torch.equal(torch.get_rng_state(), chance), "training that asks for a plan must not change by it"


def test_policies_are_tried_from_the_fastest_on(config):
    planner, long = Planner(config, replace(CARD, host_us=0.001)), "data.max_length=8192"
    recipe = recipe_of("train.gradient_checkpointing=auto", "train.cuda_graphs=false", long)
    for policy in ("none", "selective", "full"):
        assert told(settle(planner, recipe, need(planner, policy, False, long))) == (policy, False)
    asked = recipe_of("train.gradient_checkpointing=auto", "train.cuda_graphs=true", long)
    assert told(settle(planner, asked, need(planner, "full", True, long))) == ("full", True)


def test_choosing_among_operators_must_pay_for_the_hosts_time(config):
    recipe = recipe_of("train.gradient_checkpointing=auto", "train.cuda_graphs=false")
    slow = Planner(config, CARD)
    room = need(slow, "selective", False)
    choice = settle(slow, recipe, room)
    assert told(choice) == ("full", False)
    times = [slow.predict(recipe_of(f"train.gradient_checkpointing={policy}", "train.cuda_graphs=false"))
             for policy in ("selective", "full")]  # fmt: skip
    before, after = (f"{found.time.total_ms:.0f}" for found in times)
    assert int(before) > int(after) and f"selective would take {before} ms instead of {after}" in choice.why
    asked = recipe_of("train.gradient_checkpointing=selective", "train.cuda_graphs=false")
    assert told(settle(slow, asked, room)) == ("selective", False), "as the recipe says"
    nobody_knows = Planner(config, None)
    assert told(settle(nobody_knows, recipe, need(nobody_knows, "selective", False))) == ("selective", False)


@pytest.mark.parametrize("policy", ["none", "full", "offload"])
def test_a_policy_that_is_given_stays(planner, policy):
    recipe = recipe_of(f"train.gradient_checkpointing={policy}")
    assert recipe.train.cuda_graphs == "auto", "by default"
    enough = need(planner, policy, True) / FOR_GRAPHS + 0.001
    assert told(settle(planner, recipe, enough)) == (policy, True)
    assert told(settle(planner, recipe, enough - 0.002)) == (policy, False)


def test_what_leaves_nothing_open_is_not_planned(planner, monkeypatch):
    monkeypatch.setattr(planner, "predict", None)
    for graphs in (True, False):
        choice = settle(planner, recipe_of(f"train.cuda_graphs={graphs}"), 1.0)
        assert told(choice) == ("full", graphs) and not choice.no_graphs
    for more, why in (
        (["train.torch_compile=true"], "layers are compiled"),
        (["train.gradient_checkpointing=selective"], "selective"),
        (["data.packing=true", "model.dtype=fp32"], "FlashAttention: it computes in bf16 and fp16"),
    ):
        choice = settle(planner, recipe_of(*more), 80.0)
        assert not choice.graphs and why in choice.no_graphs


def test_one_trace_answers_with_and_without_graphs(planner, monkeypatch):
    made = []
    monkeypatch.setattr(predict, "TracedRecipe", lambda *args: made.append(1) or TracedRecipe(*args))
    plain = recipe_of()
    assert not settle(planner, plain, 0.1).graphs
    graphed, ordinary = (planner.predict(recipe_of(f"train.cuda_graphs={on}")) for on in (True, False))
    assert len(made) == 1 and graphed.total > ordinary.total and graphed.time.host_ms < ordinary.time.host_ms
    settle(planner, recipe_of("weights=auto"), 0.1)
    planner.predict(recipe_of("weights=auto", "train.cuda_graphs=false"))
    assert len(made) == 3, "what is measured before a step is compared by other times with graphs"


def test_padding_is_weighed_by_the_time_that_it_costs(config):
    recipe = recipe_of("train.cuda_graphs=auto")
    slow_host, fast_host = (
        Planner(config, replace(CARD, host_us=us, launch_us=0.1, product_us=0.1)) for us in (500.0, 0.001)
    )
    assert settle(slow_host, recipe, 80.0, lambda: (200.0, 400.0)).graphs
    no = settle(fast_host, recipe, 80.0, lambda: (200.0, 240.0))
    assert not no.graphs and "20% more tokens, which are predicted to cost more than they save" in no.no_graphs
    assert settle(fast_host, recipe, 80.0, lambda: (512.0, 512.0)).graphs, "rows that are full cost nothing"
    assert "how long those of a stream are" in settle(slow_host, recipe, 80.0, lambda: None).no_graphs
    unknown = settle(Planner(config, None), recipe, 80.0, lambda: (200.0, 240.0))
    assert not unknown.graphs and "lowprec doctor --measure" in unknown.no_graphs


def test_without_a_gpu_nothing_is_planned_or_said(monkeypatch):
    monkeypatch.setattr("lowprec.plan.settle.Planner", None)
    choice = settle_on(recipe_of(*BOTH), torch.device("cpu"), row_lengths=None, against_graphs="several processes")
    assert told(choice) == ("none", False) and not choice.no_graphs and choice.why.startswith("auto: without a GPU")
    assert told(settle_on(recipe_of(), torch.device("cpu"))) == ("full", False)
    asked = settle_on(recipe_of("train.cuda_graphs=true"), torch.device("cpu"))
    assert "no CUDA device" in asked.checked(tiny_model("llama"), torch.device("cpu")).no_graphs, "who asks is told"


def test_on_a_gpu_what_is_free_and_the_limit_decide(config, monkeypatch):
    free = [80 * GIB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * GIB))
    monkeypatch.setattr("lowprec.plan.run.this_machine", lambda: CARD)
    choice = settle_on(recipe_of(*BOTH), CUDA, config=config)
    assert told(choice) == ("none", True) and choice.why.startswith("auto: ") and "of 80.0 GiB" in choice.why
    given = settle_on(recipe_of(), CUDA, config=config)
    assert told(given) == ("full", True) and given.why == "as the recipe says"
    several = settle_on(recipe_of(), CUDA, config=config, against_graphs="several processes train")
    assert not several.graphs and several.no_graphs == "several processes train"
    limit = need(Planner(config, CARD), "full", False) * 1.001
    limited = settle_on(recipe_of(f"profile.vram_limit_gib={limit}"), CUDA, config=config)
    free[0] = int(limit * GIB)
    for choice in (limited, settle_on(recipe_of(), CUDA, config=config)):
        assert told(choice) == ("full", False) and "more than 90%" in choice.no_graphs


def test_what_cannot_be_predicted_is_trained_without(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
    nowhere = settle_on(recipe_of(*BOTH), CUDA)
    assert told(nowhere) == ("full", False) and "could not be predicted" in nowhere.no_graphs == nowhere.why[6:]

    def fails(self, recipe, *size):
        raise NotImplementedError("data-dependent")

    monkeypatch.setattr(Planner, "predict", fails)
    untraced = settle_on(recipe_of(), CUDA, config=config)
    assert told(untraced) == ("full", False) and "NotImplementedError: data-dependent" in untraced.no_graphs


def test_plans_say_what_they_settled(planner, config):
    notes: list[str] = []
    recipe = settled(planner, recipe_of(*BOTH), 80.0, notes)
    assert recipe.train.cuda_graphs is True and recipe.train.gradient_checkpointing == "none"
    assert notes[0].startswith("train.gradient_checkpointing=auto is none here: ")
    assert notes[1].startswith("train.cuda_graphs=auto is true here: ")
    keys = ["model.model_name_or_path=x", "data.max_length=512"]
    roomy = lowprec.plan("lora", keys, machine=CARD, config=config, vram=80.0)
    tight = lowprec.plan("lora", keys, machine=CARD, config=config, vram=roomy.prediction.total / GIB)
    assert roomy.recipe.train.cuda_graphs is True and tight.recipe.train.cuda_graphs is False
    assert tight.fits and tight.prediction.time.host_ms > roomy.prediction.time.host_ms
    assert any("train.cuda_graphs=auto is false here: with them" in note for note in tight.to_dict()["notes"])
    asked = recipe_of("train.cuda_graphs=true")
    changes = advice(planner, "lora", ["model.model_name_or_path=./nowhere", "data.path=none"], asked, 0.0)
    assert any((change.key, change.value) == ("train.cuda_graphs", "false") for change in changes)
