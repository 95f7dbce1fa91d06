"""Whether a checkpoint belongs to the recipe that resumes it, what has changed since, and what there is to do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lowprec.config import RECIPE_FILE, Recipe
from lowprec.errors import UserError
from lowprec.layers.base import WeightScheme
from lowprec.layers.report import WrapReport
from lowprec.prepare import as_scheme
from lowprec.run_folder import read_report
from lowprec.train.state import PROGRESS

_HARMLESS = ("name", "defaults", "train.output_dir", "train.resume_from_checkpoint", "train.save_steps",
             "train.save_total_limit", "train.eval_steps", "train.eval_max_samples", "train.num_sample_answers",
             "train.sample_max_new_tokens", "train.gradient_checkpointing", "train.offload_embeddings",
             "train.report_to",
             "train.per_device_eval_batch_size", "train.grid_g_co2e_per_kwh")  # fmt: skip
_BINDING = (
    "model.model_name_or_path",
    "model.dtype",
    "weights",
    "wrap.rules",
    "adapter",
    "optimizer.master",
    "optimizer.state_dtype",
)
_ROUNDING = ("adapter.fused", "weights.product", "weights.min_sqnr_db", "weights.tokens")
"""Inside a binding group, what changes the rounding of products alone."""
_SETTLED = (
    "train.max_steps",
    "train.cuda_graphs",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
)
"""What a finished run's recipe may hold otherwise than it was asked for (``find_batch_size``), or is told apart."""


def check_same_run(recipe: Recipe, checkpoint: Path) -> list[str]:
    """Compare the recipe with the one stored in a checkpoint.

    Returns:
        Messages about keys that make the rest of the run differ from an undisturbed one.

    Raises:
        UserError: the checkpoint's weights or states do not fit this recipe.
    """
    before, now, changed = _changes(recipe, checkpoint / RECIPE_FILE)
    binding = [key for key in changed if (key.startswith(_BINDING) and key not in _ROUNDING) or key == "optimizer"]
    if binding:
        told = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} now)" for key in binding)
        raise UserError(
            f"{checkpoint} was made by another recipe: {told}. Resume with the recipe.yaml of that run folder, or "
            "choose another train.output_dir."
        )
    return [
        f"{key} was {before.get(key)} in the checkpoint and is {now.get(key)} now: the rest is not that of one run."
        for key in changed
    ]


def _changes(recipe: Recipe, file: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The keys of a stored recipe and of this one, and those that differ and change numbers."""
    stored = OmegaConf.to_container(OmegaConf.create(file.read_text()))
    mine = OmegaConf.to_container(OmegaConf.create(recipe.to_yaml()))
    before, now = _flat(stored) | _choices(stored), _flat(mine) | _choices(mine)
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key) and key not in _HARMLESS]
    return before, now, [key for key in changed if not key.startswith("profile.")]  # how it is measured changes nothing


def nothing_to_do(recipe: Recipe) -> str:
    """What the user is told of a run folder whose run is finished."""
    steps = read_report(Path(str(recipe.train.output_dir))).get("steps")
    text = f"{recipe.train.output_dir} holds a finished run of {steps} steps, and its final/ is whole. Nothing to do."
    if recipe.train.max_steps not in (None, steps):
        text += (
            f" train.max_steps={recipe.train.max_steps} was not applied: to train on, resume from a checkpoint of this "
            "run into another train.output_dir."
        )
    stored = Path(str(recipe.train.output_dir), RECIPE_FILE)
    if stored.is_file():
        before, now, changed = _changes(recipe, stored)
        told = ", ".join(
            f"{key} ({before.get(key)} there, {now.get(key)} asked for)" for key in changed if key not in _SETTLED
        )
        text += f" Not applied: {told}." if told else ""
    return text


def stored_division(checkpoint: Path) -> tuple[int, int] | None:
    """Micro-batch and accumulation of the run that wrote a checkpoint."""
    stored = _flat(OmegaConf.to_container(OmegaConf.create((checkpoint / RECIPE_FILE).read_text())))
    size, accumulation = (stored.get(f"train.{key}") for key in ("per_device_train_batch_size",
                                                                "gradient_accumulation_steps"))  # fmt: skip
    return (size, accumulation) if size and accumulation else None


def stored_graphs(checkpoint: Path) -> bool:
    """What ``train.cuda_graphs`` was, settled, for the run that wrote a checkpoint: rows are padded by it."""
    stored = _flat(OmegaConf.to_container(OmegaConf.create((checkpoint / RECIPE_FILE).read_text())))
    return stored.get("train.cuda_graphs") is True


def choices_to_json(choices: Mapping[str, WeightScheme | None]) -> dict[str, Any]:
    """What weight schemes that choose chose for each layer, for a checkpoint's ``progress``."""
    return {
        layer: scheme and {"name": scheme.option_name, "fields": OmegaConf.to_container(OmegaConf.structured(scheme))}
        for layer, scheme in choices.items()
    }


def stored_choices(checkpoint: Path) -> dict[str, WeightScheme | None]:
    """The choices that a checkpoint holds, for ``wrap``: times on another machine, or of another day, would choose
    other layers."""

    def scheme(kept: dict[str, Any]) -> Any:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(as_scheme(kept["name"])), kept["fields"]))

    return {layer: kept and scheme(kept) for layer, kept in _progress(checkpoint).get("choices", {}).items()}


def check_same_layers(report: WrapReport, checkpoint: Path) -> None:
    """Raises UserError where a layer is stored otherwise than in the run that wrote a checkpoint: this machine may not
    run its scheme."""
    stored = _progress(checkpoint).get("layers", {})
    for row in report.rows:
        if stored.get(row.name, row.scheme) != row.scheme:
            raise UserError(
                f"{row.name} was {stored[row.name]} in {checkpoint} and is {row.scheme} here"
                f"{f' ({row.reason})' if row.reason else ''}: resume on a machine like that run's, or start in another "
                "train.output_dir."
            )


def _progress(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / PROGRESS).read_text())["progress"]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        key: value
        for name, inner in node.items()
        for key, value in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def _choices(recipe: Any) -> dict[str, Any]:
    return {
        key.removeprefix("override "): choice
        for entry in recipe["defaults"]
        if isinstance(entry, dict)
        for key, choice in entry.items()
    }
