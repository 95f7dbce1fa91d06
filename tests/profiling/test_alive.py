"""What is alive: kinds and modules of a real step, sums that are exact, and a device of a given size on any machine."""

import pytest
import torch

from lowprec.profiling.alive import Alive, Timeline
from lowprec.testing import VOCAB_SIZE, tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(2 * 32).view(2, 32) % 200


def step(model, optimizer, alive=None, ids=IDS):
    turn = alive.enter_phase if alive is not None else lambda phase: None
    turn("forward")
    loss = model(input_ids=ids, labels=ids).loss
    turn("backward")
    loss.backward()
    del loss
    turn("optimizer")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    turn("")


@pytest.fixture
def trained():
    model = tiny_model("llama").train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    return model, optimizer


def followed(model, optimizer, **kwargs):
    alive = Alive(CPU, model, optimizer, **kwargs)
    with alive:
        step(model, optimizer, alive)
    return Timeline.of(alive)


def test_kinds_of_a_full_step_are_what_they_must_be(trained):
    model, optimizer = trained
    timeline = followed(model, optimizer)
    parameters = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert (timeline.by_kind["weights"] == parameters + buffers).all()
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    assert (timeline.by_kind["optimizer"] == states).all()
    assert timeline.by_kind["adapters"].max() == 0
    assert timeline.by_kind["gradients"].max() == parameters
    assert timeline.by_kind["gradients"][-1] == 0 and timeline.by_kind["activations"][-1] == 0
    logits = 2 * 32 * VOCAB_SIZE * 4
    assert logits <= timeline.by_kind["logits"].max() <= 4 * logits
    assert sum(timeline.parts().values()) == timeline.peak.max()


def test_activations_grow_with_the_batch_and_shrink_by_checkpointing(trained):
    model, optimizer = trained
    kept = followed(model, optimizer).by_kind["activations"].max()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = followed(model, optimizer)
    # Of two layers one is recomputed at a time, and the inputs of both are kept.
    assert 0.4 * kept < recomputed.by_kind["activations"].max() < 0.8 * kept
    before = [moment.phase for moment in recomputed.alive.moments].index("backward")
    assert recomputed.by_kind["activations"][before] < 0.3 * kept


def test_lora_holds_adapters_and_their_gradients_alone():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear")).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer)
    timeline = followed(model, optimizer)
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (timeline.by_kind["adapters"] == adapters).all()
    assert timeline.by_kind["gradients"].max() == adapters


def test_modules_are_named_in_forward_and_backward(trained):
    model, optimizer = trained
    alive = Alive(CPU, model, optimizer)
    with alive:
        step(model, optimizer, alive)
    seen = {(moment.phase, moment.module) for moment in alive.moments if "mm" in moment.operator}
    for phase in ("forward", "backward"):
        assert (phase, "model.layers.1.mlp.down_proj") in seen and (phase, "lm_head") in seen
    peak = Timeline.of(alive).modules()
    assert peak[0][2] >= peak[-1][2] and any(module == "model.layers.*.mlp.down_proj" for module, *_ in peak)


def test_a_limit_is_a_device_of_that_size(trained):
    model, optimizer = trained
    whole = followed(model, optimizer)
    alive = Alive(CPU, model, optimizer, limit=int(whole.peak.max() * 0.9))
    with pytest.raises(torch.OutOfMemoryError), alive:
        step(model, optimizer, alive)
    failed = Timeline.of(alive)
    assert failed.at == alive.failed_at
    parts = failed.parts()
    assert sum(parts.values()) > whole.peak.max() * 0.9
    assert parts["weights"] == whole.parts()["weights"] and parts["activations"] > 0
    optimizer.zero_grad()
    followed(model, optimizer, limit=int(whole.peak.max()))  # what fits, fits


def test_points_keep_the_peak(trained):
    timeline = followed(*trained)
    points = timeline.points(20)
    assert len(points) == 20 and timeline.at in points


def test_views_count_once_and_inplace_operators_make_nothing():
    alive = Alive(CPU)
    with alive:
        x = torch.zeros(1000)
        y = x.view(10, 100).t()
        y.add_(1)
        del x
        held = alive._held
        del y
    assert held == 4000 and alive._held == 0


@pytest.mark.gpu
def test_kinds_add_up_to_what_the_allocator_holds():
    device = torch.device("cuda", 0)
    model = tiny_model("llama", hidden_size=512, intermediate_size=1024).train().to(device)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters())
    ids = IDS.to(device)
    step(model, optimizer, ids=ids)
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, ids=ids)
    true_peak = torch.cuda.max_memory_allocated()
    alive = Alive(device, model, optimizer)
    with alive:
        step(model, optimizer, alive, ids)
    timeline = Timeline.of(alive)
    assert timeline.peak.max() == pytest.approx(true_peak, rel=0.01)
    assert sum(timeline.parts().values()) == timeline.peak.max()
    assert timeline.by_kind["weights"].min() >= sum(p.nbytes for p in model.parameters())
