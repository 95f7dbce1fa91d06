"""From a traced step to its time: what the host launches, what comes and goes, what clipping reads."""

from dataclasses import replace

import pytest
import torch

from lowprec.config import resolve
from lowprec.machine import named_card
from lowprec.plan import Planner, predict, timing
from lowprec.plan.predict import CALLS_TOGETHER
from lowprec.plan.states import States, Trained, states_of
from lowprec.testing import save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=7)


def test_a_step_is_no_faster_than_its_host(folder):
    recipe, _ = resolve("lora", [f"model.model_name_or_path={folder}", "data.path=some"])
    machines = [replace(named_card("H100"), host_us=host_us) for host_us in (10.0, 1000.0)]
    times = [Planner(tiny_model("llama").config, machine).predict(recipe).time for machine in machines]
    assert times[1].host_ms == pytest.approx(100 * times[0].host_ms) and times[1].total_ms > 50 * times[0].products_ms


def test_updates_in_backward_launch_a_norm_and_an_update_for_each_large_parameter(folder, monkeypatch):
    sizes = [p.numel() for p in tiny_model("llama").parameters()]
    recipe, _ = resolve("full", [f"model.model_name_or_path={folder}", "data.path=some", "train.max_grad_norm=null",
                                 "train.gradient_accumulation_steps=1"])  # fmt: skip

    def host_ms(small, together):
        monkeypatch.setattr("lowprec.plan.predict.SMALL", small)
        monkeypatch.setattr("lowprec.plan.predict.TOGETHER", together)
        config = tiny_model("llama").config
        return Planner(config, replace(named_card("H100"), host_us=1000.0)).predict(recipe).time.host_ms

    alone, small = host_ms(0, 1), [size for size in sizes if size <= 64]
    assert alone - host_ms(64, sum(small)) == pytest.approx(2 * len(small) - CALLS_TOGETHER)
    assert alone - host_ms(64, sum(small) // 2) == pytest.approx(2 * len(small) - 2 * CALLS_TOGETHER)
    assert alone - host_ms(max(sizes), sum(sizes)) == pytest.approx(2 * len(sizes) - CALLS_TOGETHER)
    trained = [Trained("w", size, torch.float32) for size in sizes]
    assert predict._calls_in_backward(trained, States([], step_chunks=3)) == len(sizes), "norms; updates by the chunk"


def test_own_operators_take_the_host_longer(folder):
    def host_ms(own_host_us, *overrides):
        recipe, _ = resolve("lora", [f"model.model_name_or_path={folder}", "data.path=some", *overrides])
        machine = replace(named_card("H100"), host_us=10.0, own_host_us=own_host_us)
        return Planner(tiny_model("llama").config, machine).predict(recipe).time.host_ms

    eight_bit = ("weights=fp8",)
    plain, dear = host_ms(None, *eight_bit), host_ms(1010.0, *eight_bit)
    own = dear - plain  # milliseconds, and as many operators
    assert own == pytest.approx(round(own)) and own > 8 * 7 * 7, "a cast and more for each layer and micro-batch"
    assert host_ms(10.0, *eight_bit) == plain
    assert host_ms(1010.0) - host_ms(None) < own / 20, "in 16 bits the loss alone is computed by one"


def test_a_replayed_layer_takes_the_host_once_a_pass(folder):
    keys = [f"model.model_name_or_path={folder}", "data.path=some", "train.gradient_accumulation_steps=3"]
    recipe, _ = resolve("lora", [*keys, "train.cuda_graphs=true"])

    def host_ms(**host):
        machine = replace(named_card("H100"), host_us=10.0, **host)
        return Planner(tiny_model("llama", num_hidden_layers=7).config, machine).predict(recipe).time.host_ms

    passes = 3 * 7 * 2
    assert host_ms(replay_us=1040.0) - host_ms() == pytest.approx(passes), "four operators where it is not measured"
    assert host_ms(replay_us=0.0) > 0, "what is outside the layers"


def test_choosing_among_operators_takes_the_host_as_long_as_another_one(folder, monkeypatch):
    recipe, _ = resolve("lora", [f"model.model_name_or_path={folder}", "data.path=some",
                                 "train.gradient_checkpointing=selective"])  # fmt: skip
    planner = Planner(tiny_model("llama").config, replace(named_card("H100"), host_us=1000.0))
    told = []
    monkeypatch.setattr("lowprec.plan.predict.step_time", lambda *a, **k: told.append(k) or timing.step_time(*a, **k))
    counted = planner.predict(recipe).time.host_ms
    tape = next(iter(planner._tapes.values())).tape
    plain = timing.step_time(tape, planner.machine, states_of(recipe, []), **told[0] | {"selective": False}).host_ms
    forward = sum(run.calls for run in tape.runs if run.phase == "forward" and run.layer is not None)
    assert forward > 0 and counted - plain == pytest.approx(2 * forward * told[0]["micro_batches"])


def test_states_in_host_memory_take_the_host_by_the_chunk(folder):
    def predicted(store, host_us):
        recipe, _ = resolve("full", [f"model.model_name_or_path={folder}", "data.path=some", f"state_store={store}"])
        return Planner(tiny_model("llama").config, replace(named_card("H100"), host_us=host_us)).predict(recipe)

    beside, away = predicted("gpu", 1000.0), predicted("cpu", 1000.0)
    chunks = away.states.step_chunks
    assert chunks > 0 == beside.states.step_chunks
    assert away.time.host_ms - beside.time.host_ms == pytest.approx(10 * chunks)
    assert away.time.total_ms - beside.time.total_ms == pytest.approx(10 * chunks)


def test_clipping_reads_the_gradients_of_all_layers(folder):
    def traffic_ms(max_grad_norm, layers):
        keys = f"data.path=some model.model_name_or_path={folder} train.max_grad_norm={max_grad_norm}".split()
        recipe, _ = resolve("full", [*keys, "train.gradient_accumulation_steps=2"])
        model = tiny_model("llama", num_hidden_layers=layers)
        time = Planner(model.config, replace(named_card("H100"), launch_us=0.0)).predict(recipe).time
        return time.traffic_ms, 2 * sum(p.numel() for p in model.parameters())  # in bf16

    found = {n: (traffic_ms("null", n), traffic_ms(1.0, n)) for n in (9, 20)}
    more = found[20][0][1] - found[9][0][1]
    costs = [clipped - plain for (plain, _), (clipped, _) in found.values()]
    scaled = 2 * more / named_card("H100").memory_gb_per_s / 1e6
    assert costs[1] - costs[0] == pytest.approx(scaled, rel=0.01), "the norm is taken either way"
