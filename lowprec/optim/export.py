"""``lowprec ssd export``: the states of a checkpoint as those of ``torch.optim.AdamW``, in safetensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lowprec_kernels.adamw import reference
from safetensors import safe_open
from torch import Tensor

from lowprec.errors import UserError
from lowprec.optim.saved_chunks import SavedChunks
from lowprec.optim.states_io import HEADER_FILE, Shards, read_header, write_json, write_shards

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
TORCH_SETTINGS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
)


def export(folder: str | Path, target: str | Path, weights: str | Path | None = None) -> None:
    """Write the states in ``folder`` (of ``AdamW.save_states``, any store, or the checkpoint that it is in) to
    ``target``, one parameter at a time.

    ``target`` gets shards with ``<parameter>.exp_avg`` and ``.exp_avg_sq`` in fp32 and ``.step``, and
    ``optimizer.json`` with the groups; ``load_exported`` makes the state dict of them.

    Args:
        weights: a safetensors file with the weights of the same checkpoint. With it a split master is put together too:
            ``<parameter>.master``, the fp32 weight that the moments belong to.

    Raises:
        UserError: the folder holds no complete states, or the weights lack a parameter.
    """
    folder, target = Path(folder), Path(target)
    if not (folder / HEADER_FILE).exists() and (folder / "optimizer" / HEADER_FILE).exists():
        folder = folder / "optimizer"
    header = read_header(folder)
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"--weights {weights} is not a file: give the safetensors file of the checkpoint's weights.")
    target.mkdir(parents=True, exist_ok=True)
    if (target / HEADER_FILE).exists():
        raise UserError(f"{target} holds optimizer states already: give an empty folder.")
    chunks = SavedChunks(folder, header) if header.store is not None else None
    saved = chunks or Shards(folder, header.shards)

    def states() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, facts in header.parameters.items():
            fields = saved.fields_of(name)
            if fields:
                yield name, _as_torch(name, fields, facts, weights)

    shards = write_shards(target, states())
    groups = [{key: group[key] for key in TORCH_SETTINGS} for group in header.groups]
    for group, values in zip(groups, header.groups, strict=True):
        group["param_names"] = values["param_names"]
    write_json(target / HEADER_FILE, {"groups": groups, "shards": shards})
    if chunks is not None:
        chunks.close()


def _as_torch(
    name: str, fields: dict[str, Tensor], facts: dict[str, Any], weights: str | Path | None
) -> dict[str, Tensor]:
    shape = facts["shape"]
    states = {"step": torch.tensor(facts["step"], dtype=torch.float32)}
    for moment in MOMENTS:
        if moment in fields:
            scale = fields.get(reference.SCALE_OF[moment])
            coded = fields[moment].reshape(-1)
            value = coded.float() if scale is None else reference.decode8(coded, scale, signed=moment == "exp_avg")
            states[moment] = value.view(shape)
    if "master" in fields:
        states["master"] = fields["master"].view(shape)
    elif "residual" in fields and weights is not None:
        weight = _weight(name, weights)
        states["master"] = reference.join_master(weight.view(-1), fields["residual"].view(-1)).view(shape)
    return states


def _weight(name: str, weights: str | Path) -> Tensor:
    with safe_open(weights, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118  a safetensors file is no mapping
            raise UserError(f"{weights} lacks {name}: give the weights of the checkpoint that the states belong to.")
        return file.get_tensor(name)


def load_exported(folder: str | Path) -> dict[str, Any]:
    """The state dict in a folder of ``export``, for ``torch.optim.AdamW(model.named_parameters()).load_state_dict``."""
    folder = Path(folder)
    header = json.loads((folder / HEADER_FILE).read_text())
    shards = Shards(folder, header["shards"])
    groups, states, number = [], {}, 0
    for group in header["groups"]:
        numbers = range(number, number + len(group["param_names"]))
        number = numbers.stop
        groups.append(group | {"betas": tuple(group["betas"]), "params": list(numbers), "decoupled_weight_decay": True})
        for i, name in zip(numbers, group["param_names"], strict=True):
            fields = {key: value for key, value in shards.fields_of(name).items() if key != "master"}
            if fields:
                states[i] = fields
    return {"state": states, "param_groups": groups}
