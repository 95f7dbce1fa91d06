"""A few traced layers say what a deep model does."""

import pytest
from transformers import AutoConfig

from lowprec.config import resolve
from lowprec.machine import named_card
from lowprec.plan.allocator import CachingAllocator
from lowprec.plan.ledger import peak_of
from lowprec.plan.model import of_template, period_of
from lowprec.plan.step import TracedRecipe
from lowprec.plan.tape import STILL, NotUniformError, Run, Tape, Template
from lowprec.testing import tiny_model

DEPTH = 6
WINDOWS = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "sliding_window": 16,
}  # fmt: skip
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
    is_stretched_right(recipe_of(*RECIPES[name]), tiny_model("llama", num_hidden_layers=DEPTH).config)


@pytest.mark.parametrize("name", ["full", "lora, offload", "lora, selective"])
@pytest.mark.parametrize("arch, depth", [("gemma2", 9), ("gemma2", 10), ("gemma3_text", 20)])
def test_layers_whose_types_come_again_are_stretched_by_their_period(name, arch, depth):
    config = AutoConfig.for_model(arch, num_hidden_layers=depth, **WINDOWS)
    assert Template(config.num_hidden_layers, period_of(config)).num_layers < config.num_hidden_layers
    is_stretched_right(recipe_of(*RECIPES[name]), config)


def is_stretched_right(recipe, config):
    card, template = named_card("H100"), Template(config.num_hidden_layers, period_of(config))
    stretched = TracedRecipe(recipe, of_template(config, template), card).trace(2, 32).stretched(template)
    deep = TracedRecipe(recipe, config, card).trace(2, 32)
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
    template = Template(DEPTH)
    few = TracedRecipe(recipe_of("lora"), of_template(tiny_model("llama").config, template), named_card("H100"))
    tape = few.trace(1, 16)
    kept = next(run for run in tape.runs if run.phase == "forward" and run.layer == 2)
    number = next(event >> 1 for event in kept.events if event & 1 == 0 and tape.sizes[event >> 1] > 512)
    goes = next(run for run in tape.runs if 2 * number + 1 in run.events)
    goes.events.remove(2 * number + 1)
    next(run for run in tape.runs if run.phase == "backward" and run.layer == 4).events.append(2 * number + 1)
    with pytest.raises(NotUniformError):
        peak_of(tape.stretched(template).events())


def test_every_layer_is_of_the_type_of_the_one_that_is_traced_for_it():
    for depth, period in ((9, 2), (10, 2), (26, 6), (32, 1)):
        template = Template(depth, period)
        stands_for = [template.layers_of(traced) for traced in range(template.num_layers)]
        assert sorted(sum(stands_for, [])) == list(range(depth))
        for traced, layers in enumerate(stands_for):
            assert all(template.traced(layer) == traced and (layer - layers[0]) % period == 0 for layer in layers)


def test_a_period_is_believed_where_nothing_else_differs_between_layers():
    def period(arch, **fields):
        return period_of(AutoConfig.for_model(arch, num_hidden_layers=12, **fields))

    assert [period("llama"), period("gemma2"), period("gemma3_text")] == [1, 2, 6]
    assert period("gemma2", layer_types=["full_attention"] * 11 + ["sliding_attention"]) == 12
    assert period("gemma3n_text", num_kv_shared_layers=4) == 12


def test_states_lie_between_the_weights_and_the_gradients_of_their_layer():
    runs = [Run(STILL, None, [0]), Run(STILL, 0, [2, 4]), Run(STILL, None, [6]), Run("forward", 0, [5])]
    tape = Tape([8, 8, 4, 2], ["weights", "weights", "gradients", "workspace"], runs, 1)
    more = tape.with_states([(0, 16), (None, 32), (0, 24)])
    comes = [(event.phase, event.kind, event.nbytes) for event in more.events() if event.comes]
    assert comes == [
        (STILL, "weights", 8), (STILL, "optimizer", 32), (STILL, "weights", 8), (STILL, "optimizer", 16),
        (STILL, "optimizer", 24), (STILL, "gradients", 4), (STILL, "workspace", 2),
    ]  # fmt: skip
    assert tape.with_states([]) == tape and [run.events for run in tape.runs] == [[0], [2, 4], [6], [5]]
