"""A few traced layers say what a deep model does."""

import pytest

from lowprec.config import resolve
from lowprec.machine import named_card
from lowprec.plan.allocator import CachingAllocator
from lowprec.plan.ledger import peak_of
from lowprec.plan.model import with_layers
from lowprec.plan.step import TracedRecipe
from lowprec.plan.tape import TEMPLATE_LAYERS, NotUniformError
from lowprec.testing import tiny_model

DEPTH = 6
RECIPES = {
    "full": ["full", "train.gradient_checkpointing=none"],
    "updates in backward": ["full", "train.max_grad_norm=null", "train.gradient_accumulation_steps=1"],
    "int8": ["full", "weights=int8_hadamard", "train.gradient_checkpointing=none"],
    "lora, offload": ["lora", "train.gradient_checkpointing=offload"],
    "lora, selective": ["lora", "train.gradient_checkpointing=selective"],
    "peft's lora": ["lora", "adapter.fused=false", "adapter.lora_dropout=0.1", "train.use_liger_kernel=false"],
    "qlora, offload": ["qlora_nf4", "weights.product=bf16", "train.gradient_checkpointing=offload"],
    "qlora, int8 products": ["qlora_nf4", "weights.product=int8"],
}


def recipe_of(name: str, *overrides: str):
    recipe, _ = resolve(name, ["model.model_name_or_path=some/model", "data.path=some", *overrides])
    return recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_stretched_trace_is_the_trace_of_the_deep_model(name):
    recipe, card = recipe_of(*RECIPES[name]), named_card("H100")
    config = tiny_model("llama").config
    few = TracedRecipe(recipe, with_layers(config, TEMPLATE_LAYERS), card).trace(2, 32)
    stretched = few.stretched(DEPTH)
    deep = TracedRecipe(recipe, with_layers(config, DEPTH), card).trace(2, 32)
    found, expected = peak_of(stretched.events()), peak_of(deep.events())
    assert (found.allocated, found.parts, found.phase) == (expected.allocated, expected.parts, expected.phase)
    for phase in ("forward", "loss", "backward"):
        assert found.by_phase[phase] == expected.by_phase[phase]
    reserved = [CachingAllocator(expandable=False).replay(tape.events()) for tape in (stretched, deep)]
    assert reserved[0] == reserved[1]

    def totals(tape):
        runs = list(tape.runs)
        products = sum((run.products for run in runs), start=type(runs[0].products)())
        return products, sum((run.moves for run in runs if run.phase != "update"), start=type(runs[0].moves)())

    assert totals(stretched) == totals(deep)


def test_layers_that_differ_are_noticed():
    few = TracedRecipe(recipe_of("lora"), with_layers(tiny_model("llama").config, TEMPLATE_LAYERS), named_card("H100"))
    tape = few.trace(1, 16)
    kept = next(run for run in tape.runs if run.phase == "forward" and run.layer == 2)
    number = next(event >> 1 for event in kept.events if event & 1 == 0 and tape.sizes[event >> 1] > 512)
    goes = next(run for run in tape.runs if 2 * number + 1 in run.events)
    goes.events.remove(2 * number + 1)
    next(run for run in tape.runs if run.phase == "backward" and run.layer == 4).events.append(2 * number + 1)
    with pytest.raises(NotUniformError):
        peak_of(tape.stretched(DEPTH).events())
