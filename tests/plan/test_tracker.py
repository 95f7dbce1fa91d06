"""A trace without data has the events of the step as it really runs."""

import pytest
import torch
from torch import nn

from lowprec.layers import gated_mlp
from lowprec.plan.ledger import peak_of
from lowprec.plan.tape import Tape
from lowprec.plan.tracker import BACKWARD, Tracker
from lowprec.testing import tiny_model
from tests.plan.loops import traced, with_8_bit_mlps, with_checkpointing, with_lora


def config_of(arch: str):
    return tiny_model(arch).config


def steps(tape: Tape) -> list[tuple[str, int | None, list[tuple[int, int]]]]:
    """What came (+1) and went (-1), with bytes, in every layer. (Before them transformers makes masks otherwise where
    it finds itself traced.)"""
    return [
        (run.phase, run.layer, [(1 - 2 * (event & 1), tape.sizes[event >> 1]) for event in run.events])
        for run in tape.runs
        if run.phase != "model" and run.layer is not None
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("prepare", [lambda m: m, with_checkpointing, with_lora], ids=["full", "checkpointed", "lora"])
def test_a_trace_is_the_real_step(arch, prepare):
    config = config_of(arch)
    is_traced_right(config, prepare)


@pytest.mark.parametrize("arch", ["llama", "gemma"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_trace_of_mlps_with_their_casts_is_the_real_step(arch, recompute, monkeypatch):
    def prepare(model):
        model = with_8_bit_mlps(model)
        return with_checkpointing(model) if recompute else model

    config = config_of(arch)
    together = is_traced_right(config, prepare, dtype=torch.bfloat16)
    monkeypatch.setattr(gated_mlp, "takes", lambda *layers: False)
    apart = is_traced_right(config, prepare, dtype=torch.bfloat16)
    kept = [peak_of(tape.events()).by_phase["forward"] for tape in (together, apart)]
    codes = 2 * 24 * (config.hidden_size + 4)  # of X, which gate and up keep for themselves where they are apart
    layers = 0 if recompute else config.num_hidden_layers
    assert kept[1] - kept[0] >= layers * codes


def is_traced_right(config, prepare, **options) -> Tape:
    config._attn_implementation = "eager"  # the same operators with and without data
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    trace, real = (traced(config, 2, 24, prepare=prepare, real=real, **options) for real in (False, True))
    assert peak_of(trace.events()).by_phase == peak_of(real.events()).by_phase
    assert peak_of(trace.events()) == peak_of(real.events())
    assert steps(trace) == steps(real)
    products = [run.products for run in trace.runs]
    assert products == [run.products for run in real.runs]
    assert len(steps(real)) == 4
    assert sum(map(len, products)) > 0
    return trace


def test_storages_are_counted_once_and_until_they_are_freed():
    tracker = Tracker()
    with tracker:
        x = torch.ones(256)
        view = x[:10]
        y = view * 2
        del x
        tracker.tape.begin("later")
        del view
    (first, second) = tracker.tape.runs
    assert [tracker.tape.sizes[e >> 1] for e in first.events] == [1024, 40]
    assert second.events == [1]  # the first storage went, when its view did
    assert y.sum() == 20


def test_gradients_and_logits_are_named():
    config = config_of("llama")
    tape = traced(config, 2, 24)
    sizes = dict.fromkeys(set(tape.kinds), 0)
    for size, kind in zip(tape.sizes, tape.kinds, strict=True):
        sizes[kind] += size
    parameters = sum(p.numel() for p in tiny_model("llama").parameters())
    assert sizes["weights"] >= 4 * parameters
    assert sizes["gradients"] == 4 * parameters
    assert sizes["logits"] >= 3 * 4 * 2 * 24 * config.vocab_size


def test_products_are_counted_with_their_shapes():
    layer = nn.Linear(32, 48, bias=False)
    tracker = Tracker()
    with tracker:
        layer(torch.ones(8, 32)).sum().backward()
    shapes = {(p.m, p.n, p.k): count for run in tracker.tape.runs for p, count in run.products.items()}
    assert shapes == {(8, 48, 32): 1, (48, 32, 8): 1}


def _peak_in_backward(fork) -> int:
    """Bytes alive at most in backward of ``fork`` of a vector of 4000 bytes."""
    x = torch.ones(1000, requires_grad=True)
    tracker = Tracker()
    with tracker:
        loss = fork(x * 2).sum()
        tracker.tape.begin(BACKWARD)
        loss.backward()
    alive = {storage for run in tracker.tape.runs[:-1] for storage in _alive(run.events)}
    sizes, peak = tracker.tape.sizes, 0
    for event in tracker.tape.runs[-1].events:
        (alive.discard if event & 1 else alive.add)(event >> 1)
        peak = max(peak, sum(sizes[storage] for storage in alive))
    return peak


def _alive(events: list[int]) -> set[int]:
    return {event >> 1 for event in events if not event & 1} - {event >> 1 for event in events if event & 1}


def test_autograd_adds_gradients_in_place():
    """As it does without a dispatch mode: two uses of a tensor take no third gradient for their sum."""
    once = _peak_in_backward(lambda y: y * 3)
    assert _peak_in_backward(lambda y: y * 3 + y * 4) == once  # two gradients there, here one and what it becomes
    assert _peak_in_backward(lambda y: y * 3 + y * 4 + y * 5) == once


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y * 3

    @staticmethod
    def backward(ctx, grad):
        grad = grad * 3
        return grad + grad * 4  # a sum of Python's own is no sum of autograd's


def test_sums_that_python_makes_are_not_in_place():
    assert _peak_in_backward(_Sum.apply) == _peak_in_backward(lambda y: y * 3 + y * 4) + 4000
