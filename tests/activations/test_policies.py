"""Every policy gives the bits of ``none``, with dropout and adapters, and holds what it says."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from lowprec.activations import POLICIES, keep_activations
from lowprec.activations.offload import Offload
from lowprec.activations.selective import Cost, Selective, choose, measure
from lowprec.attention import attend_without_masks
from lowprec.errors import UserError
from lowprec.testing import ARCHITECTURES, tiny_model

RECOMPUTING = [policy for policy in POLICIES if policy != "none"]


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


def passes(model, policy, count=2):
    """Gradients after ``count`` micro-batches, the losses, and what random numbers come next."""
    torch.manual_seed(7)
    activations = keep_activations(model, policy)
    model.train()
    losses = []
    for index in range(count):
        loss = model(input_ids=ids(length=12 + index), labels=ids(length=12 + index), use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, torch.rand(4), activations


def same_bits(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("policy", RECOMPUTING)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bits_of_none(arch, policy):
    fields = {"attention_dropout": 0.0}
    same_bits(passes(tiny_model(arch, **fields), policy), passes(tiny_model(arch, **fields), "none"))


@pytest.mark.parametrize("policy", RECOMPUTING)
@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("llama", {"attention_dropout": 0.3}),
        ("phi", {"resid_pdrop": 0.2, "attention_dropout": 0.1}),
        ("gpt2", {"resid_pdrop": 0.2, "attn_pdrop": 0.1}),
    ],
)
def test_bits_of_none_with_dropout(arch, fields, policy):
    one, other = (passes(tiny_model(arch, **fields), name) for name in (policy, "none"))
    same_bits(one, other)
    assert not torch.equal(passes(tiny_model(arch), "none")[0][0], other[0][0])  # dropout does something


@pytest.mark.parametrize("policy", RECOMPUTING)
def test_bits_of_none_under_lora(policy):
    results = []
    for name in (policy, "none"):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False)
        results.append(passes(get_peft_model(tiny_model("llama").requires_grad_(False), config), name))
    same_bits(*results)
    assert all("lora_" in name for name in results[0][1])


def test_offload_sends_all_inputs_but_the_last_and_keeps_none():
    model = tiny_model("llama", num_hidden_layers=5)
    *_, activations = passes(model, "offload")
    offload = activations.function
    assert isinstance(offload, Offload)
    assert offload.sent_bytes == 4 * 2 * (12 + 13) * 64 * 4
    assert offload._newest() is None  # nothing outlives the graph


def test_offload_of_a_graph_that_is_dropped_or_walked_twice():
    model = tiny_model("llama", num_hidden_layers=3)
    offload = keep_activations(model, "offload").function
    model.train()
    loss = model(input_ids=ids(), labels=ids()).loss
    assert offload._newest() is not None
    del loss
    assert offload._newest() is None
    loss = model(input_ids=ids(), labels=ids()).loss
    first = torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight, retain_graph=True)[0]
    second = torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0]
    assert torch.equal(first, second)


class Calls(TorchDispatchMode):
    """Counts the products."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += str(function) in ("aten.mm.default", "aten.addmm.default")
        return function(*args, **(kwargs or {}))


def test_selective_computes_less_again_than_full_and_says_what_it_keeps():
    counts = {}
    for policy in ("none", "selective", "full"):
        model = tiny_model("llama")
        *_, activations = passes(model, policy, count=1)  # measures
        with Calls() as calls:
            model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        counts[policy] = calls.products
    assert counts["none"] <= counts["selective"] <= counts["full"] and counts["none"] < counts["full"]
    kept = keep_activations(tiny_model("llama"), "selective").to_dict()
    assert "kept" not in kept  # not measured yet
    model = tiny_model("llama")
    *_, activations = passes(model, "selective", count=1)
    kept = activations.to_dict()["kept"]
    assert kept and sum(row["bytes"] for row in kept) <= 4 * 2 * 12 * 64 * 4
    assert all(row["us"] > 0 for row in kept)


def test_the_dearest_a_byte_are_kept_within_the_budget():
    costs = [Cost(("a", 0), 1.0, 10), Cost(("b", 0), 5.0, 100), Cost(("c", 0), 3.0, 10), Cost(("c", 1), 0.1, 1)]
    assert [cost.key for cost in choose(costs, 21)] == [("c", 0), ("a", 0), ("c", 1)]
    assert choose(costs, 0) == []


def test_what_is_overwritten_random_or_a_view_is_never_kept():
    def layer(x):
        first = x @ x
        second = x @ x
        first.add_(1)  # as adapters do
        numpy_like = second.exp()
        numpy_like.data.detach().numpy()[0] = 0  # through a pointer: no version changes
        return torch.dropout(first, 0.5, True).view(-1), second.t(), numpy_like

    names = [cost.key for cost in measure(layer, (torch.rand(8, 8, requires_grad=True),))]
    assert ("aten.mm.default", 0) not in names and ("aten.mm.default", 1) in names
    assert not any("exp" in name or "view" in name or "dropout" in name or "bernoulli" in name for name, _ in names)


def test_measuring_leaves_no_trace():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    x = torch.rand(4, 4, requires_grad=True)
    torch.manual_seed(0)
    measure(lambda t: torch.dropout(t @ t, 0.5, True), (x,))
    assert x.grad is None and torch.equal(torch.rand(3), expected)
    assert Selective().describe() == []


def test_models_without_layers_to_compute_again_are_refused():
    with pytest.raises(UserError, match="gradient_checkpointing=none"):
        keep_activations(torch.nn.Linear(2, 2), "full")
    assert keep_activations(torch.nn.Linear(2, 2), "none").policy == "none"


@pytest.mark.gpu
@pytest.mark.parametrize("policy", RECOMPUTING)
def test_bits_of_none_on_the_gpu_without_waiting(policy):
    def gradients(name):
        model = tiny_model("llama", num_hidden_layers=6, dtype=torch.bfloat16).cuda().train()
        assert attend_without_masks(model)  # as in training: to choose a mask, transformers would read the batch back
        keep_activations(model, name)
        batch = ids(4, 64).cuda()
        for step in range(3):
            torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
            try:
                model.model(input_ids=batch, use_cache=False).last_hidden_state.float().square().mean().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [p.grad for p in model.model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(policy), gradients("none"), strict=True))


@pytest.mark.gpu
def test_offload_holds_less_on_the_gpu_than_full():
    """With frozen weights: the gradients of others add up while the inputs go, and could be the most at the end."""
    peaks = {}
    for policy in ("full", "offload"):
        model = tiny_model("llama", num_hidden_layers=12, hidden_size=512, dtype=torch.bfloat16).cuda().train()
        model.requires_grad_(False).enable_input_require_grads()
        assert attend_without_masks(model)
        keep_activations(model, policy)
        batch = ids(8, 512).cuda()
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            model.model(input_ids=batch, use_cache=False).last_hidden_state.float().mean().backward()
        peaks[policy] = torch.cuda.max_memory_allocated() - held
    assert peaks["offload"] < peaks["full"] - 8 * 8 * 512 * 512 * 2  # nine of the twelve inputs are away
