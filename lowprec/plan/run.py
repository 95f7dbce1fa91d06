"""``lowprec.plan(...)``: from a recipe's name to what it takes and what would fit."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lowprec.config import Recipe, resolve
from lowprec.machine import NAMED_CARDS, Machine, card_of, named_card, this_machine
from lowprec.plan.predict import Planner, model_config, parse_gib
from lowprec.plan.report import Plan
from lowprec.plan.search import advice, largest, nearest_recipe
from lowprec.plan.settle import settled

NO_DATA = "data.path=the_data"
"""Stands for data that have not been named yet; nothing reads it."""


def plan(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    vram: str | float | None = None,
    gpu: str | None = None,
    machine: Machine | None = None,
    config: Any = None,
) -> Plan:
    """Predict what a recipe takes, without loading a weight.

    Args:
        recipe: a shipped recipe's name, or the path of a YAML file.
        overrides: ``key=value``, as on the command line. ``data.path`` need not be set.
        vram: device memory that there is, as ``"8GiB"`` or a number of GiB; by default the card's.
        gpu: a named card, such as ``"RTX 4060"``; by default this machine's measured profile, or its card.
        machine: instead of ``gpu``, a machine.
        config: of the model, in the place of ``model.model_name_or_path``.

    Raises:
        UserError: a mistake in the recipe, no configuration of the model, an unknown card.
    """
    given = _named(list(overrides))
    chosen, notes = resolve(recipe, given)
    found, told = (machine, []) if machine is not None else find_machine(gpu)
    notes += told
    limit = parse_gib(vram) if isinstance(vram, str) else vram
    if limit is None:
        limit = found.vram_gib if found is not None else own_vram_gib()
    own_limit = getattr(getattr(chosen, "profile", None), "vram_limit_gib", None)
    if own_limit is not None:
        limit = min(own_limit, limit or own_limit)
    planner = Planner(config or model_config(chosen.model), found)
    chosen = settled(planner, chosen, limit, notes)
    prediction = planner.predict(chosen)
    notes += _limits_of(chosen)
    if limit is None:
        return Plan(recipe=chosen, prediction=prediction, machine=found, vram_gib=None, notes=notes)
    nbytes = limit * 2**30
    fits = prediction.total <= nbytes
    return Plan(
        recipe=chosen,
        prediction=prediction,
        machine=found,
        vram_gib=limit,
        largest=largest(planner, chosen, nbytes),
        advice=[] if fits else advice(planner, recipe, given, chosen, nbytes),
        nearest_recipe=None if fits else nearest_recipe(planner, recipe, given, chosen, nbytes),
        notes=notes,
    )


def _named(overrides: list[str]) -> list[str]:
    return overrides if any(item.startswith("data.path=") for item in overrides) else [*overrides, NO_DATA]


def _limits_of(recipe: Recipe) -> list[str]:
    """What a prediction of this recipe takes for granted."""
    notes = []
    if recipe.choice("weights") == "auto" or getattr(recipe.weights, "product", "") == "auto":
        notes.append("Where training chooses kernels by measuring (auto), the plan chooses by predicted times.")
    if recipe.train.torch_compile:
        notes.append("train.torch_compile=true is predicted as if it were false.")
    if recipe.choice("optimizer").startswith("paged"):
        notes.append(
            "Paged states are counted in host memory; the driver may keep them on the GPU where there is room."
        )
    return notes


def find_machine(gpu: str | None) -> tuple[Machine | None, list[str]]:
    """The card of that name, else this machine as measured, else its card's datasheet, else None and what to do.

    Raises:
        UserError: an unknown name.
    """
    if gpu is not None:
        return named_card(gpu), []
    measured = this_machine()
    if measured is not None and measured.vram_gib > 0:
        return measured, []
    remedy = "lowprec doctor --measure measures this machine's"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        known = card_of(device.name, device.multi_processor_count)
        if known is None:
            return None, [f"Nothing is known of the rates of a {device.name}, so there are no times: {remedy}."]
        own = replace(named_card(known), vram_gib=device.total_memory / 2**30)
        return own, [f"Rates are those of the {known}'s datasheet; {remedy}."]
    return None, [
        f'No GPU is known here, so there are no times: name a card, as --gpu "RTX 4060" (there are '
        f"{', '.join(NAMED_CARDS)}). On a machine with a GPU, {remedy}."
    ]


def own_vram_gib() -> float | None:
    """Of the GPU that is here, whatever is known of it."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
