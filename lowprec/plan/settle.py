"""What ``train.gradient_checkpointing=auto`` and ``train.cuda_graphs=auto`` stand for: the one place that decides both,
for training on a device and for plans of one.

The fastest is sought first. Graphs spare the host, which no policy does, so every policy is tried with them before any
is tried without. ``auto`` records layers where

- it can: on one CUDA device, for one process, layers not compiled nor ``selective``;
- a step with them is predicted to take no more than ``FOR_GRAPHS`` of the memory that is free: what graphs hold is
  nobody else's between replays, so evaluation, sample answers, and steps that take more than was predicted live on the
  rest;
- rows need not be padded for it, or the padding is predicted to cost less time than the host's launches do. On a card
  that is slower than its host, an eighth of ``data.max_length`` a row would be lost for nothing. Packed rows are full
  but for one or two in a hundred tokens: for them it is never asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowprec.activations import POLICIES, why_no_graphs
from lowprec.activations.policy import NOT_SELECTIVE
from lowprec.config import Recipe
from lowprec.errors import UserError
from lowprec.plan.predict import GIB, Planner, Prediction, model_config
from lowprec.plan.timing import StepTime
from lowprec.train.options import AUTO

FOR_GRAPHS = 0.9
"""The most of the free memory that ``auto`` lets a step with graphs be predicted to take."""
AS_GIVEN = "as the recipe says"
UNKNOWN = "the device's memory is not known"

RowLengths = tuple[float, float] | None
"""Mean tokens of a row, padded to the longest of its micro-batch, and padded to few shapes; None: not known."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Both settled."""

    policy: str
    why: str
    graphs: bool
    no_graphs: str = ""
    """Why there are none, where that is to be told."""

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with this choice."""
        return _with(recipe, gradient_checkpointing=self.policy, cuda_graphs=self.graphs)

    def checked(self, model: Any, device: torch.device, packed: torch.dtype | None = None) -> "Choice":
        """With what the model says against graphs; see ``why_no_graphs``."""
        reason = why_no_graphs(model, self.policy, device, packed) if self.graphs else None
        return self if reason is None else replace(self, graphs=False, no_graphs=reason)


def settle_on(
    recipe: Recipe,
    device: torch.device,
    *,
    config: Any = None,
    row_lengths: Callable[[], RowLengths] | None = None,
    against_graphs: str = "",
) -> Choice:
    """Settle both for training on a device. Call it before the model is there.

    Args:
        config: of the model, in the place of ``model.model_name_or_path``.
        row_lengths: of the data; None where padding is not to be weighed.
        against_graphs: why ``auto`` must not record layers, whatever is free.
    """
    train = recipe.train
    if device.type != "cuda":  # nothing to record, and nothing to say of it
        recipe = _without_auto_graphs(recipe)
        if train.gradient_checkpointing == AUTO:
            why = "auto: without a GPU memory is host memory, and computing again costs time"
            return Choice("none", why, recipe.train.cuda_graphs is True)
    if against_graphs and train.cuda_graphs == AUTO:
        return replace(settle_on(_without_auto_graphs(recipe), device, config=config), no_graphs=against_graphs)
    given = _as_given(recipe)
    if given is not None:
        return given
    from lowprec.plan.run import find_machine  # there, plans are settled by this module

    limits = [torch.cuda.mem_get_info(device)[0] / GIB, recipe.profile.vram_limit_gib]
    limit = min(limit for limit in limits if limit is not None)
    try:
        planner = Planner(config or model_config(recipe.model), find_machine(None)[0])
        choice = settle(planner, recipe, limit, row_lengths)
    except Exception as error:  # a model that cannot be traced can still be trained
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        unknown = f"the memory could not be predicted ({told[:300]})"
        policy = "full" if train.gradient_checkpointing == AUTO else train.gradient_checkpointing
        choice = Choice(policy, unknown, train.cuda_graphs is True, unknown if train.cuda_graphs == AUTO else "")
    return replace(choice, why=f"auto: {choice.why}" if train.gradient_checkpointing == AUTO else AS_GIVEN)


def settle(
    planner: Planner, recipe: Recipe, limit_gib: float | None, row_lengths: Callable[[], RowLengths] | None = None
) -> Choice:
    """Settle both where ``limit_gib`` of device memory are free; None: nobody knows.

    Raises:
        UserError: the recipe does not suit the model.
    """
    given = _as_given(recipe)
    if given is not None:
        return given
    if recipe.train.cuda_graphs != AUTO:
        return _first_that_fits(planner, recipe, limit_gib)[0]
    against = UNKNOWN if limit_gib is None else _against_graphs(planner, recipe)
    if not against:
        assert limit_gib is not None
        graphed = _with(recipe, cuda_graphs=True)
        choice, need = _first_that_fits(planner, graphed, limit_gib * FOR_GRAPHS)
        if need > limit_gib * FOR_GRAPHS:
            against = f"with them {need:.1f} GiB are predicted, more than {FOR_GRAPHS:.0%} of the {limit_gib:.1f} free"
        elif row_lengths is not None:
            against = _padding_costs_more(planner, choice.of(recipe), row_lengths())
        if not against:
            return replace(choice, why=f"{need:.1f} of {limit_gib:.1f} GiB are predicted")
    return replace(settle(planner, _without_auto_graphs(recipe), limit_gib), no_graphs=against)


def settled(planner: Planner, recipe: Recipe, limit_gib: float | None, notes: list[str]) -> Recipe:
    """The recipe with both settled, and notes on what was."""
    choice, train = settle(planner, recipe, limit_gib), recipe.train
    if train.gradient_checkpointing == AUTO:
        notes.append(f"train.gradient_checkpointing=auto is {choice.policy} here: {choice.why}.")
    if train.cuda_graphs == AUTO:
        why = choice.no_graphs or "layers are replayed as CUDA graphs, for which there is room"
        notes.append(f"train.cuda_graphs=auto is {str(choice.graphs).lower()} here: {why}.")
    return choice.of(recipe)


def _as_given(recipe: Recipe) -> Choice | None:
    """The choice of a recipe that leaves nothing open."""
    train = recipe.train
    if AUTO in (train.gradient_checkpointing, train.cuda_graphs):
        return None
    return Choice(train.gradient_checkpointing, AS_GIVEN, bool(train.cuda_graphs))


def _first_that_fits(planner: Planner, recipe: Recipe, limit_gib: float | None) -> tuple[Choice, float]:
    """The first policy that is predicted to fit, else the last one; and the GiB that it needs.

    ``selective`` is left out where computing everything again is predicted to be faster: to choose among operators
    the host looks at each (LoRA of the 8B shape, 2 x 2048, beside an H100: 482 ms a step, and 352 with ``full``).
    """
    train = recipe.train
    graphs = bool(train.cuda_graphs)
    policies: tuple[str, ...] = (train.gradient_checkpointing,)
    if train.gradient_checkpointing == AUTO:
        if limit_gib is None:
            return Choice("full", UNKNOWN, graphs), 0.0
        policies = tuple(policy for policy in POLICIES if not (graphs and policy == "selective"))
    slower = ""
    for policy in policies:
        found = planner.predict(_with(recipe, gradient_checkpointing=policy))
        need = found.total / GIB
        if limit_gib is not None and need <= limit_gib:
            if policy == "selective" and len(policies) > 1 and (slower := _slower_than_full(planner, recipe, found)):
                continue
            return Choice(policy, f"{need:.1f} of {limit_gib:.1f} GiB are predicted{slower}", graphs), need
    why = f"{need:.1f} GiB are predicted, more than the {limit_gib:.1f} that there are"
    return Choice(policy, why, graphs), need


def _slower_than_full(planner: Planner, recipe: Recipe, selective: Prediction) -> str:
    """What is to be said where ``full`` is predicted to take less time; else empty, and where no rates are known."""
    full = planner.predict(_with(recipe, gradient_checkpointing="full"))
    if full.time is None or selective.time is None or full.time.total_ms >= selective.time.total_ms:
        return ""
    return f", and selective would take {selective.time.total_ms:.0f} ms instead of {full.time.total_ms:.0f}"


def _against_graphs(planner: Planner, recipe: Recipe) -> str:
    """What can be said against graphs before the model is there."""
    if recipe.train.torch_compile:
        return "layers are compiled"
    if recipe.train.gradient_checkpointing == "selective":
        return NOT_SELECTIVE
    no_flash = planner.why_no_flash(recipe) if recipe.data.packing else None
    return f"rows are packed, which takes FlashAttention: {no_flash}" if no_flash else ""


def _padding_costs_more(planner: Planner, recipe: Recipe, lengths: RowLengths) -> str:
    """Why padding rows to few shapes is not worth it; empty where it is."""
    if lengths is None:
        return "rows would be padded to few shapes, and how long those of a stream are is not known beforehand"
    plain, padded = lengths
    if padded <= plain:
        return ""
    more = f"rows padded to few shapes have {padded / plain - 1:.0%} more tokens"
    graphs, ordinary = (planner.predict(_with(recipe, cuda_graphs=on)).time for on in (True, False))
    if graphs is None or ordinary is None:
        return f"{more}, and no rates of this card are known to weigh them by (lowprec doctor --measure)"
    with_ms, without_ms = (
        _busy_ms(time, length / recipe.data.max_length) for time, length in ((graphs, padded), (ordinary, plain))
    )
    if with_ms <= without_ms:
        return ""
    return f"{more}, which are predicted to cost more than they save ({with_ms:.0f} instead of {without_ms:.0f} ms)"


def _busy_ms(time: StepTime, share: float) -> float:
    """Of a step whose rows have this share of ``data.max_length``."""
    return max((time.products_ms + time.traffic_ms) * share + time.update_ms, time.host_ms)


def _without_auto_graphs(recipe: Recipe) -> Recipe:
    return _with(recipe, cuda_graphs=False) if recipe.train.cuda_graphs == AUTO else recipe


def _with(recipe: Recipe, **keys: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **keys))
