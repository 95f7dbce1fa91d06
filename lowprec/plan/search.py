"""What fits: the largest batch, which key to change first, and the nearest shipped recipe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from lowprec.activations import POLICIES
from lowprec.config import Recipe, resolve
from lowprec.errors import UserError
from lowprec.plan.graphs import in_graphs
from lowprec.plan.predict import GIB, Planner
from lowprec.recipes import shipped_recipes

LENGTH_STEP = 64
MOST_ROWS = 512
TRACED_LOGITS = 2**32
"""A step of more logits than these (tokens times vocabulary) is not traced to find the largest batch."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One key changed by itself."""

    key: str
    value: Any
    saves_gib: float
    fits: bool
    also: str = ""
    """A second key that has to change with it."""


def largest(planner: Planner, recipe: Recipe, limit: float) -> tuple[int, int] | None:
    """(rows, length) of the largest micro-batch within ``limit`` bytes: the most rows of ``data.max_length``, or where
    one does not fit, the longest one. None where nothing does."""
    length, rows = recipe.data.max_length, recipe.train.per_device_train_batch_size
    if planner.at_rest(recipe) > limit:
        return None
    believed = max(TRACED_LOGITS // (length * planner.vocab_size), 2 * rows)
    found = last_that_fits(lambda count: planner.predict(recipe, count, length).total, limit, rows, MOST_ROWS, believed)
    if found:
        return found, length
    most = max(length // LENGTH_STEP, 1)
    steps = last_that_fits(
        lambda count: planner.predict(recipe, 1, count * LENGTH_STEP).total, limit, most, most, most, second=1
    )
    return (1, steps * LENGTH_STEP) if steps else None


def last_that_fits(
    need: Callable[[int], int], limit: float, start: int, most: int, believed: int, second: int | None = None
) -> int:
    """The largest count up to ``most`` whose need is within the limit, 0 for none.

    Needs rise almost along a line, so the line through the two counts nearest to the limit says where to look. Beyond
    the count ``believed`` it is believed. Where ``start`` is too much, ``second`` is tried next (by default its half).
    """
    known = {start: need(start)}
    fits, fails = 0, most + 1
    guess = start
    while True:
        if known[guess] <= limit:
            fits = max(fits, guess)
        else:
            fails = min(fails, guess)
        if fails - fits <= 1:
            return fits
        if len(known) == 1:
            guess = 2 * start if fits else second or max(start // 2, 1)
        else:
            first, second = sorted(known, key=lambda count: abs(known[count] - limit))[:2]
            slope = max((known[second] - known[first]) / (second - first), 1.0)
            guess = first + int((limit - known[first]) / slope // 1)
            if len(known) > 3 and len(known) % 2:  # where needs rise in steps, the line may lead nowhere
                guess = (fits + fails) // 2
        guess = min(max(guess, fits + 1), fails - 1)
        if guess > believed:
            if believed in known:
                return guess
            guess = believed
        known[guess] = need(guess)


def advice(planner: Planner, name: str, overrides: list[str], recipe: Recipe, limit: float) -> list[Advice]:
    """Every single change that saves device memory, the largest gain first."""
    now = planner.predict(recipe).total
    found = []
    for key, value, also in _changes(planner, recipe):
        added = [f"{key}={value}", *([also] if also else [])]
        try:
            need = planner.predict(_changed(name, overrides, recipe, added)).total
        except UserError:  # a change that this recipe or model does not take
            continue
        if need < now:
            found.append(Advice(key, value, (now - need) / GIB, need <= limit, also))
    return sorted(found, key=lambda change: change.saves_gib, reverse=True)


def _changes(planner: Planner, recipe: Recipe) -> list[tuple[str, Any, str]]:
    """(key, value, what goes with it) that might save memory."""
    train = recipe.train
    found: list[tuple[str, Any, str]] = []
    policy = train.gradient_checkpointing
    if in_graphs(recipe):
        found.append(("train.cuda_graphs", "false", ""))
    lighter = POLICIES[POLICIES.index(policy) + 1 :] if policy in POLICIES else ()
    found += [("train.gradient_checkpointing", value, "") for value in lighter]
    if train.per_device_train_batch_size > 1:
        more = f"train.gradient_accumulation_steps={train.gradient_accumulation_steps * 2}"
        found.append(("train.per_device_train_batch_size", train.per_device_train_batch_size // 2, more))
    if recipe.data.max_length > 256:
        found.append(("data.max_length", recipe.data.max_length // 2, ""))
    adapter, weights = recipe.choice("adapter"), recipe.choice("weights")
    if adapter == "none":
        found.append(("adapter", "lora", ""))
        if recipe.choice("optimizer") == "adamw":
            if recipe.optimizer.state_dtype == "fp32":
                found.append(("optimizer.state_dtype", "int8", ""))
            if recipe.optimizer.master == "fp32":
                found.append(("optimizer.master", "split", ""))
            if recipe.choice("state_store") == "gpu":
                found.append(("state_store", "cpu", ""))
            if train.max_grad_norm is not None or train.gradient_accumulation_steps > 1:
                found.append(("train.max_grad_norm", "null", "train.gradient_accumulation_steps=1"))
        else:
            found.append(("optimizer", "adamw", "optimizer.state_dtype=int8"))
        return found
    if not train.offload_embeddings and not planner.config.get_text_config().tie_word_embeddings:
        found.append(("train.offload_embeddings", "true", ""))
    if weights != "nf4":
        found.append(("weights", "nf4", ""))
        if weights == "bf16":
            found.append(("weights", "int8_hadamard", ""))
    return found


def _changed(name: str, overrides: list[str], recipe: Recipe, added: list[str]) -> Recipe:
    """The recipe with other keys. Where no other option is chosen it need not be composed again, which takes a tenth of
    a second."""
    if all("." in item.partition("=")[0] for item in added):
        return _with_keys(recipe, added)
    return resolve(name, _replaced(_replaced(overrides, _settled(recipe)), added))[0]


def _settled(recipe: Recipe) -> list[str]:
    """What may have been ``auto``, as it was settled."""
    return [f"train.{key}={getattr(recipe.train, key)}" for key in ("gradient_checkpointing", "cuda_graphs")]


def _with_keys(recipe: Recipe, added: Sequence[str]) -> Recipe:
    """``group.key=value`` put in place; the options check their values as they always do."""
    groups: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(added)))
    return replace(recipe, **{group: replace(getattr(recipe, group), **keys) for group, keys in groups.items()})


def _replaced(overrides: list[str], added: list[str]) -> list[str]:
    keys = {item.partition("=")[0] for item in added}
    return [item for item in overrides if item.partition("=")[0] not in keys] + added


@dataclass(frozen=True, slots=True)
class Nearest:
    """A shipped recipe that fits."""

    name: str
    also: tuple[str, ...] = ()
    """The keys to set with it, where it fits with a smaller micro-batch alone."""


GROUPS = ("adapter", "weights", "optimizer", "state_store")
"""In which recipes differ, as far as memory goes."""


def nearest_recipe(planner: Planner, name: str, overrides: list[str], recipe: Recipe, limit: float) -> Nearest | None:
    """The shipped recipe that differs in the fewest groups from this one and fits, with the same model and data; of
    several, the one that takes most. First with the batch as it is, then with one row at a time and the same effective
    batch, then with the inputs of its layers in host memory as well."""
    train = recipe.train
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    one_row = (
        ("train.per_device_train_batch_size=1", f"train.gradient_accumulation_steps={batch}")
        if train.per_device_train_batch_size > 1
        else ()
    )
    kept = [item for item in overrides if item.partition(".")[0] in ("model", "data", "train") or item[:6] == "model="]
    kept = _replaced(kept, _same_batch(recipe))
    others = []
    for shipped in shipped_recipes():
        try:
            others.append((shipped, resolve(shipped, kept)[0]))
        except UserError:  # a recipe that these data or this model do not suit
            continue
    others.sort(key=lambda entry: _differences(entry[1], recipe))
    for also in dict.fromkeys([(), one_row, (*one_row, "train.gradient_checkpointing=offload")]):
        known = {planner.key(recipe)}
        candidates: list[tuple[int, int, str]] = []
        for shipped, plain in others:
            other, different = _with_keys(plain, also), _differences(plain, recipe)
            if (shipped == name and not also) or planner.key(other) in known:
                continue  # another name for the same
            if candidates and different > candidates[0][0]:
                break
            known.add(planner.key(other))
            try:
                if planner.at_rest(other) <= limit and (total := planner.predict(other).total) <= limit:
                    candidates.append((different, -total, shipped))
            except UserError:
                continue
        if candidates:
            return Nearest(min(candidates)[2], also)
    return None


def _differences(recipe: Recipe, other: Recipe) -> int:
    return sum(recipe.choice(group) != other.choice(group) for group in GROUPS)


def _same_batch(recipe: Recipe) -> list[str]:
    train = recipe.train
    return [
        f"model.model_name_or_path={recipe.model.model_name_or_path}",
        f"data.path={recipe.data.path}",
        f"data.max_length={recipe.data.max_length}",
        f"train.per_device_train_batch_size={train.per_device_train_batch_size}",
        f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}",
        *_settled(recipe),
    ]
