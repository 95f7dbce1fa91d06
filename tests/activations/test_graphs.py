"""Layers from graphs give what layers give, on the CPU with a recorder that takes the recorded function again."""

import copy
import functools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lowprec.activations import keep_activations, why_no_graphs
from lowprec.activations.graphs import MOST_SHAPES, GraphedLayer, LayerGraphs
from lowprec.activations.places import copies
from lowprec.attention import attend_without_masks
from lowprec.data.documents import Documents
from lowprec.lora import fuse
from lowprec.optim import AdamW
from lowprec.testing import tiny_model
from tests.activations.rehearsal import adapted, batch, graphed, same, train

POLICIES = ("none", "full", "offload")


NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma", "phi", "gpt2", "opt"])
def test_the_numbers_are_those_of_ordinary_layers(arch, policy, monkeypatch):
    plain = tiny_model(arch, **NO_DROPOUT.get(arch, {}))
    model = copy.deepcopy(plain)
    activations, recorder = graphed(model, policy, monkeypatch)
    same(train(model, 5), train(plain, 5))
    layers = sum(isinstance(getattr(m, "_gradient_checkpointing_func", None), GraphedLayer) for m in model.modules())
    assert not activations.graphs.reason and layers
    assert recorder.replays == 3 * 2 * layers  # steps 3 to 5, forward and backward
    assert activations.to_dict()["cuda_graphs"]["graphs"] == 2 * layers


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_fused_adapters(policy, autocast, monkeypatch):
    results = []
    for graphs in (False, True):
        model = adapted(tiny_model("llama"))
        if graphs:
            activations, recorder = graphed(model, policy, monkeypatch)
        else:
            keep_activations(model, policy)
        fuse(model)
        results.append(train(model, 6, autocast, micro=2))
    same(*results)
    assert recorder.replays and not activations.graphs.reason


def test_each_shape_has_its_own_up_to_a_limit(monkeypatch):
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    activations, recorder = graphed(model, "full", monkeypatch)

    def of_many_lengths(step):
        return batch(step, length=8 + step % (MOST_SHAPES + 2))

    same(
        train(model, 4 * (MOST_SHAPES + 2), batches=of_many_lengths),
        train(plain, 4 * (MOST_SHAPES + 2), batches=of_many_lengths),
    )
    figures = activations.to_dict()["cuda_graphs"]
    assert figures["shapes"] == MOST_SHAPES and figures["ordinary_path"] == [f"more than {MOST_SHAPES} shapes came"]


def test_graphs_that_hold_what_backward_needs_take_one_pass_at_a_time(monkeypatch):
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    _, recorder = graphed(model, "none", monkeypatch)
    found = []
    for m in (plain, model):
        train(m, 3)
        before = recorder.replays
        losses = [m(**batch(step)).loss for step in (10, 11)]
        sum(losses).backward()
        found.append((losses, [p.grad for p in m.parameters()]))
    same(*found)
    assert recorder.replays == before + 2 * len(model.model.layers)


def test_what_is_watched_or_random_or_without_gradients_takes_the_ordinary_path(monkeypatch):
    model = tiny_model("llama")
    activations, recorder = graphed(model, "full", monkeypatch)
    train(model, 3)
    before, seen = recorder.replays, []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    train(model, 1)
    assert seen and recorder.replays == before + 2 * (len(model.model.layers) - 1)
    handle.remove()
    with torch.no_grad():
        model(**batch(0))
    model.eval()(**batch(0)).loss.backward()
    assert recorder.replays == before + 2 * (len(model.model.layers) - 1)

    model = tiny_model("llama", attention_dropout=0.2)
    activations, recorder = graphed(model, "full", monkeypatch)
    train(model, 5)
    assert not recorder.replays and not activations.graphs.reason
    assert activations.graphs.ordinary == {"a layer draws random numbers"}


def test_a_layer_whose_parameters_moved_takes_the_ordinary_path(monkeypatch):
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    _, recorder = graphed(model, "none", monkeypatch)
    train(model, 3), train(plain, 3)
    before = recorder.replays
    for m in (model, plain):
        weight = m.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data * 2
    same(train(model, 1), train(plain, 1))
    assert recorder.replays == before + 2 * (len(model.model.layers) - 1)


def test_what_cannot_be_recorded_is_said_and_trains_all_the_same(monkeypatch):
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    activations, recorder = graphed(model, "full", monkeypatch)

    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recorder.record = fails
    with pytest.warns(UserWarning, match="kernel by kernel"):
        found = train(model, 5)
    same(found, train(plain, 5))
    assert "not permitted" in activations.to_dict()["cuda_graphs"]["why_not"]


def test_a_copy_of_the_model_begins_without_graphs(monkeypatch):
    model = tiny_model("llama")
    graphed(model, "full", monkeypatch)
    train(model, 3)
    again = copy.deepcopy(model)
    same(train(again, 2), train(model, 2))


def test_packed_rows():
    """Borders are filled up with empty samples to few shapes."""
    documents = Documents.of([5, 7, 12]).rounded()
    assert documents.borders.tolist() == [0, 5, 12, 24, 24, 24, 24, 24, 24] and documents.longest == 16
    assert Documents.of([3] * 9).rounded().borders.numel() == 17
    model = tiny_model("llama")
    assert attend_without_masks(model)
    with pytest.raises(ValueError, match="FlashAttention"):
        model(**batch(0, 2, 12), documents=documents)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_that_are_used_at_once_are_not_copied(policy, monkeypatch):
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    activations, _ = graphed(model, policy, monkeypatch)
    lent = [p for p in model.parameters() if p.ndim > 1]
    asked = SimpleNamespace(
        update_in_backward=lambda: None, uses_gradient_at_once=lambda p: any(p is other for other in lent)
    )
    activations.update_in_backward(asked)
    copied = []
    monkeypatch.setattr(
        "lowprec.activations.recorded.copies",
        lambda grads: copied.extend(g is not None for g in grads) or copies(grads),
    )

    def use(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in (*plain.parameters(), *model.parameters()):
        parameter.register_post_accumulate_grad_hook(use)
    same(train(model, 5), train(plain, 5))
    assert 0 < sum(copied) < len(copied) / 2, "norms' weights alone"


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_copied_once_the_optimizer_that_used_them_is_closed(policy, monkeypatch):
    monkeypatch.setattr("lowprec.optim.backward.SMALL", 0)
    model = tiny_model("llama")
    activations, _ = graphed(model, policy, monkeypatch)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    activations.update_in_backward(optimizer)
    lent = [p for p in model.parameters() if optimizer.uses_gradient_at_once(p)]
    for step in range(4):
        model.train()(**batch(step)).loss.backward()
        optimizer.step()
    assert lent and activations.graphs.recorded
    optimizer.close()
    plain = tiny_model("llama")
    plain.load_state_dict(model.state_dict())
    same(train(model, 3, micro=2), train(plain, 3, micro=2))


class Skipping(torch.nn.Module):
    """Two layers of a model with a connection around the second one, and perhaps a weight of both."""

    def __init__(self, model, shared):
        super().__init__()
        self.model = model
        if shared:
            first, second = model.model.layers[:2]
            second.mlp.down_proj.weight = first.mlp.down_proj.weight

    def forward(self, input_ids, **_):
        inner = self.model.model
        hidden = inner.embed_tokens(input_ids)
        turned = inner.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        one, two = (partial(layer, position_embeddings=turned) for layer in inner.layers[:2])
        first = one(hidden)
        loss = (two(first + hidden) * first).square().mean() * 1e5
        return SimpleNamespace(loss=loss)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shared", [False, True])
def test_connections_around_layers_and_weights_of_two(policy, shared, monkeypatch):
    """A gradient may wait in autograd while other layers are replayed."""
    plain = Skipping(tiny_model("llama"), shared)
    model = copy.deepcopy(plain)
    activations, recorder = graphed(model.model, policy, monkeypatch)
    assert activations.graphs.shares_parameters is shared
    (losses, weights), (plain_losses, plain_weights) = train(model, 6), train(plain, 6)
    assert recorder.replays and not activations.graphs.reason and plain_losses[-1] < 0.9 * plain_losses[0]
    for mine, theirs in zip((*losses, *weights), (*plain_losses, *plain_weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)  # sums of two gradients, in another order


def test_layers_that_were_missed_stay_ordinary_where_the_graphs_hold_what_backward_needs(monkeypatch):
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    activations, recorder = graphed(model, "none", monkeypatch)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    found = train(model, 3)
    handle.remove()
    layers = len(model.model.layers)
    same(found, train(plain, 3))
    before = recorder.replays
    same(train(model, 4), train(plain, 4))
    assert recorder.replays == before + 4 * 2 * (layers - 1)
    assert activations.graphs.ordinary == {"a layer came after others of its shape were recorded"}


def test_a_second_backward_is_refused_where_it_would_be_wrong(monkeypatch):
    model = tiny_model("llama")
    graphed(model, "none", monkeypatch)
    train(model, 3)
    loss = model.train()(**batch(0)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("policy", POLICIES)
def test_shapes_in_turn(policy, monkeypatch):
    """With ``none`` they share memory, and the pass of one must not begin before the other's has ended."""
    plain = adapted(tiny_model("llama"))
    model = copy.deepcopy(plain)
    activations, recorder = graphed(model, policy, monkeypatch)

    def of_two_lengths(step):
        return batch(step, length=(8, 12, 12, 8, 12)[step % 5])

    found = [train(m, 15, batches=of_two_lengths, micro=2) for m in (model, plain)]
    same(*found)
    layers = len(model.base_model.model.model.layers)
    assert activations.to_dict()["cuda_graphs"]["shapes"] == 2 and recorder.replays == 2 * layers * (30 - 2 * 2)
    losses = []
    for m in (model, plain):
        short, long = m(**batch(0, length=8)).loss, m(**batch(1, length=12)).loss
        losses.append(short + long)
        losses[-1].backward()
    same(*([[loss.detach()], [p.grad for p in m.parameters() if p.grad is not None]]
           for loss, m in zip(losses, (model, plain), strict=True)))  # fmt: skip
    once = policy == "none"  # the second of the two took the ordinary path
    assert recorder.replays == 2 * layers * (30 - 2 * 2) + 2 * layers * (1 if once else 2)


def test_a_layer_that_is_called_by_keywords_alone_takes_the_ordinary_path(monkeypatch):
    model = tiny_model("llama").train()
    graphed(model, "full", monkeypatch)
    layer, x = model.model.layers[0], torch.randn(1, 4, 16, requires_grad=True)
    calls = functools.partial(lambda hidden_states: 2 * hidden_states, hidden_states=x)
    assert torch.equal(layer._gradient_checkpointing_func(calls), 2 * x)


def test_the_report_says_why_there_are_none():
    activations = keep_activations(tiny_model("llama"), "full", no_graphs="there is no CUDA device")
    assert activations.to_dict()["cuda_graphs"] == {"why_not": "there is no CUDA device"}
    assert "No CUDA graphs: there is no CUDA device" in activations.told()
    plain = keep_activations(tiny_model("llama"), "full")
    assert "cuda_graphs" not in plain.to_dict() and "graphs" not in plain.told()


@pytest.mark.parametrize("policy", POLICIES)
def test_forgotten_graphs_give_their_memory_back_and_are_recorded_again(policy, monkeypatch):
    model, plain = tiny_model("llama"), tiny_model("llama")
    keep_activations(plain, policy)
    activations, recorder = graphed(model, policy, monkeypatch)
    layers = len(model.model.layers)
    same(train(model, 4), train(plain, 4))
    assert recorder.replays == 2 * layers * 2
    activations.forget_graphs()
    graphs = activations.graphs
    assert not graphs.recorded and not graphs.places and not graphs.reason
    same(train(model, 2), train(plain, 2))
    assert recorder.replays == 2 * layers * 2, "the first two take the ordinary path, as at the beginning"
    same(train(model, 2), train(plain, 2))
    assert recorder.replays == 2 * layers * 4
    keep_activations(plain, policy).forget_graphs()  # of none, nothing


def test_why_not():
    model = tiny_model("llama")
    assert "no CUDA device" in why_no_graphs(model, "full", torch.device("cpu"))
    assert "selective" in why_no_graphs(model, "selective", torch.device("cuda"))
    assert "no layers" in why_no_graphs(torch.nn.Linear(2, 2), "none", torch.device("cuda"))
    assert why_no_graphs(model, "offload", torch.device("cuda")) is None
    assert LayerGraphs(True).to_dict() == {"shapes": 0, "graphs": 0, "recording_s": 0.0}
