"""The recipe's model as training prepares it, from its config.json alone and without data in any tensor."""

import copy
import warnings
from typing import Any

from lowprec.attention import attend_without_masks
from lowprec.config import Recipe
from lowprec.layers.host_embedding import put_on_host
from lowprec.layers.report import WrapReport
from lowprec.machine import Machine
from lowprec.plan.activations import keep_activations_like
from lowprec.plan.follow import find_layers
from lowprec.plan.graphs import in_graphs
from lowprec.plan.liger_like import put_liger_like
from lowprec.plan.schemes import experts_left_alone, without_data
from lowprec.plan.tape import Template
from lowprec.prepare import wrap


def of_template(config: Any, template: Template) -> Any:
    """A copy of the configuration for a model of the layers that are traced."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None:
        text.layer_types = [layer_types[template.layers_of(traced)[0]] for traced in range(template.num_layers)]
    text.num_hidden_layers = template.num_layers
    return config


def period_of(config: Any) -> int:
    """After how many layers their types come again, as far as the configuration says; all of them where it says that
    layers differ in something else, too."""
    text = config.get_text_config()
    types = list(getattr(text, "layer_types", None) or [None])
    period = next(n for n in range(1, len(types) + 1) if types[n:] == types[:-n])
    others = {name: value for name, value in vars(text).items() if "layer" in name and "norm" not in name}
    if period > 1 and any(value for name, value in others.items() if name not in ("num_hidden_layers", "layer_types")):
        return int(text.num_hidden_layers)
    return period


def build_model(recipe: Recipe, config: Any, machine: Machine) -> tuple[Any, WrapReport, tuple[int, int]]:
    """What ``lowprec.train.built`` makes of a loaded model. Call it under ``no_data()``.

    Returns:
        The model, the report on its linear layers, and how many parameters it was loaded with outside its layers and in
        them.

    Raises:
        UserError: as training would, such as a scheme that converts no layer.
    """
    import transformers

    keywords: dict[str, Any] = {"dtype": recipe.model.torch_dtype, "trust_remote_code": recipe.model.trust_remote_code}
    if recipe.model.attn_implementation is not None:
        keywords["attn_implementation"] = recipe.model.attn_implementation
    model: Any = transformers.AutoModelForCausalLM.from_config(config, **keywords)
    layers = find_layers(model, config.get_text_config().num_hidden_layers)
    inside = sum(p.numel() for p in layers.parameters()) if layers is not None else 0
    outside = sum(p.numel() for p in model.parameters()) - inside
    # A packed row is taken as one sample, which takes the same memory and no less time.
    attend_without_masks(model, recipe.data.max_length + recipe.train.sample_max_new_tokens)
    rules = {pattern: without_data(s, machine) for pattern, s in recipe.wrap.schemes(recipe.weights).items()}
    with warnings.catch_warnings():  # what a user should know of the scheme, training says
        warnings.simplefilter("ignore")
        report = wrap(
            model,
            without_data(recipe.weights, machine),
            rules=experts_left_alone(model, machine) | rules,
            frozen=recipe.choice("adapter") != "none",
            use_liger_kernel=False,
            in_graphs=in_graphs(recipe),
        )
    if recipe.train.use_liger_kernel and (machine.capability or (0, 0)) >= (8, 0):
        put_liger_like(model, machine.sm_count)
    model = recipe.adapter.attach(model)
    model.config.use_cache = False
    keep_activations_like(recipe.train.gradient_checkpointing, model, machine)
    if recipe.train.offload_embeddings and machine.capability is not None:  # a processor has nowhere to offload to
        put_on_host(model, pin=False)
    model.train()
    recipe.adapter.fuse(model)
    return model, report, (outside, inside)
