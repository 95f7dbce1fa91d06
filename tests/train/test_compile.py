"""Compiled layers give the loss and gradients of plain ones, and the time for compiling is told."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from lowprec.activations import keep_activations
from lowprec.config import resolve
from lowprec.errors import UserError
from lowprec.fused import rope
from lowprec.fused.loss_head import put_loss
from lowprec.testing import sqnr_db, tiny_model
from lowprec.train.compile import compile_layers, compile_seconds
from lowprec.train.step import loss_sum
from tests.fused.test_loss_head import batch


@pytest.mark.parametrize("policy", ["none", "full"])
def test_compiled_layers_keep_their_numbers(policy):
    results = []
    for compiled in (False, True):
        model = tiny_model("llama", use_cache=False)
        put_loss(model)
        keep_activations(model.train(), policy)
        torch.compiler.reset()  # else what the other case compiled may serve this one
        before = compile_seconds()
        assert not compiled or compile_layers(model, backend="eager") == 2
        loss = loss_sum(model, batch())
        loss.backward()
        assert (compile_seconds() > before) is compiled
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (expected, gradient), (loss, mine) = results
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert sqnr_db(gradient, mine) > 90


def test_rotary_embeddings_by_a_kernel_are_compiled_with_their_layer(monkeypatch):
    """The definition in the kernel's place; the name that stands for it is not the one of the attention's module."""
    ops = pytest.importorskip("liger_kernel.ops")
    monkeypatch.setattr(ops, "LigerRopeFunction", SimpleNamespace(apply=lambda *args: rope.plain_rope(*args)))
    monkeypatch.setattr(rope, "runs_on", lambda x: True)
    losses = []
    rope._with_kernel.cache_clear()
    for fused in (False, True):
        model = tiny_model("llama", use_cache=False)
        put_loss(model)
        attentions = [module for module in model.modules() if rope.recognise(module)]
        for module in attentions if fused else ():
            rope.put_kernel(module)
        torch.compiler.reset()
        counters.clear()
        compile_layers(model, backend="eager")
        losses.append(loss_sum(model, batch()).detach())
        assert len(attentions) == 2 and not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    rope._with_kernel.cache_clear()  # what it made calls the definition
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="no layers"):
        compile_layers(nn.Linear(2, 2))
    common = ["model.model_name_or_path=x", "data.path=y", "train.torch_compile=true"]
    with pytest.raises(UserError, match="gradient_checkpointing=offload"):
        resolve("lora", [*common, "train.gradient_checkpointing=offload"])
    with pytest.raises(UserError, match="packing"):
        resolve("lora", [*common, "data.packing=true"])
    with pytest.raises(UserError, match="compiled or recorded"):
        resolve("lora", [*common, "train.cuda_graphs=true"])


@pytest.mark.parametrize(
    ("given", "found"), [("auto", "auto"), ("Auto", "auto"), ("true", True), ("false", False), ("'true'", True)]
)
def test_graphs_are_a_choice_of_three(given, found):
    common = ["model.model_name_or_path=x", "data.path=y"]
    recipe = resolve("lora", [*common, f"train.cuda_graphs={given}"])[0]
    assert recipe.train.cuda_graphs == found
    assert f"cuda_graphs: {str(found).lower()}\n" in recipe.to_yaml()
    assert resolve("lora", [*common, "train.torch_compile=true"])[0].train.cuda_graphs == "auto"
    with pytest.raises(UserError, match="train.cuda_graphs=some is not one of auto, true, false"):
        resolve("lora", [*common, "train.cuda_graphs=some"])


@pytest.mark.parametrize(
    ("given", "policy"), [("true", "full"), ("false", "none"), ("selective", "selective"), ("auto", "auto")]
)
def test_policies_and_their_old_spelling(given, policy):
    common = ["model.model_name_or_path=x", "data.path=y"]
    recipe = resolve("lora", [*common, f"train.gradient_checkpointing={given}"])[0]
    assert recipe.train.gradient_checkpointing == policy
    assert f"gradient_checkpointing: {policy}" in recipe.to_yaml()
    with pytest.raises(UserError, match="none, full, selective, offload, auto"):
        resolve("lora", [*common, "train.gradient_checkpointing=some"])
