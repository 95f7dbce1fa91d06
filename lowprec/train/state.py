"""What a checkpoint holds, and how it comes back bit for bit: weights, optimizer, schedule, position, chance."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowprec.checkpoint import atomic_folder
from lowprec.config import RECIPE_FILE, Recipe
from lowprec.data import StepLoader
from lowprec.errors import UserError
from lowprec.optim import load_optimizer_states, save_optimizer_states

TRAINABLE = "trainable.safetensors"
OPTIMIZER = "optimizer"
PROGRESS = "progress.json"
SELF_CHECKED = f"{OPTIMIZER}/states-*.bin"
"""The chunks of an ssd store, each with a checksum of its own."""


@dataclass
class TrainState:
    """All that changes while training. ``progress`` is the loop's own: JSON-able, read back as it was."""

    model: nn.Module
    """The bare model, without Accelerate's wrapper."""
    optimizer: torch.optim.Optimizer
    schedule: Any
    loader: StepLoader
    recipe: Recipe
    progress: dict[str, Any]

    def save(self, folder: Path, accelerator: Accelerator, keeps: str) -> None:
        """Write the checkpoint ``folder``. Every process calls this; the main one writes what all of them share.

        Raises:
            UserError: the disk is full. ``keeps`` says what stays usable.
        """
        writing = folder.parent / f".writing-{folder.name}"
        if accelerator.is_main_process:
            with atomic_folder(folder, needed_bytes=self._bytes(), keeps=keeps, self_checked=SELF_CHECKED) as temporary:
                assert temporary == writing
                accelerator.wait_for_everyone()  # the others may write into the folder now
                self._save_shared(temporary)
                _save_random(temporary, accelerator.process_index)
                accelerator.wait_for_everyone()  # ... and have done so
        else:
            accelerator.wait_for_everyone()
            _save_random(writing, accelerator.process_index)
            accelerator.wait_for_everyone()
        accelerator.wait_for_everyone()

    def load(self, folder: Path, accelerator: Accelerator) -> None:
        """Take everything back from a checkpoint that has been verified.

        Raises:
            UserError: the checkpoint is of another model, adapter, or number of processes.
        """
        load_trainable(self.model, folder)
        groups = [dict(group) for group in self.optimizer.param_groups]
        load_optimizer_states(self.optimizer, folder / OPTIMIZER)
        saved = json.loads((folder / PROGRESS).read_text())
        self._load_schedule(saved["schedule"], groups)
        self.loader.load_state_dict(saved["loader"])
        self.progress.update(saved["progress"])
        _load_random(folder, accelerator.process_index)

    def _load_schedule(self, saved: dict[str, Any], groups: list[dict[str, Any]]) -> None:
        """Take the schedule's position from the checkpoint, and rates and decay from the recipe.

        Args:
            groups: the optimizer's groups as the recipe made them.
        """
        if not isinstance(self.schedule, torch.optim.lr_scheduler.LambdaLR):
            self.schedule.load_state_dict(saved)
            return
        self.schedule.load_state_dict(saved | {"base_lrs": self.schedule.base_lrs})
        for group, mine in zip(self.optimizer.param_groups, groups, strict=True):
            group.update({key: mine[key] for key in ("weight_decay", "betas", "eps", "initial_lr") if key in mine})
        factors = [factor(self.schedule.last_epoch) for factor in self.schedule.lr_lambdas]
        for group, base, factor in zip(self.optimizer.param_groups, self.schedule.base_lrs, factors, strict=True):
            group["lr"] = base * factor
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _save_shared(self, folder: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trainable(self.model).items()}
        save_file(tensors, folder / TRAINABLE)
        save_optimizer_states(self.optimizer, folder / OPTIMIZER)
        saved = {
            "schedule": self.schedule.state_dict(),
            "loader": self.loader.state_dict(),
            "progress": self.progress,
        }
        (folder / PROGRESS).write_text(json.dumps(saved, indent=1))
        (folder / RECIPE_FILE).write_text(self.recipe.to_yaml(), encoding="utf-8")

    def _bytes(self) -> int:
        weights = sum(tensor.nbytes for tensor in trainable(self.model).values())
        states = sum(
            value.nbytes
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        return weights + states


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that train, by name; a tied parameter once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's weights into the parameters that train.

    Raises:
        UserError: the names or shapes differ.
    """
    saved, mine = load_file(folder / TRAINABLE), trainable(model)
    different = sorted(set(saved) ^ set(mine)) or [
        name for name, tensor in saved.items() if tensor.shape != mine[name].shape or tensor.dtype != mine[name].dtype
    ]
    if different:
        raise UserError(
            f"{folder} is a checkpoint of another set of weights ({len(different)} differ, the first is "
            f"{different[0]}). Resume with the recipe in that run folder, or choose another train.output_dir."
        )
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(saved[name])


def random_state() -> dict[str, Any]:
    """Every generator that training may draw from. Taking it does not wait for the device."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002  the global one is what libraries use
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since ``random_state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _save_random(folder: Path, rank: int) -> None:
    state = random_state()
    tensors = {name: state[name] for name in ("torch", "cuda") if state[name] is not None}
    kind, keys, position, has_gauss, cached = state["numpy"]
    numbers = [kind, keys.tolist(), int(position), int(has_gauss), float(cached)]
    host = {"python": state["python"], "numpy": numbers}
    save_file(tensors, folder / f"random-{rank}.safetensors", metadata={"host": json.dumps(host)})


def _load_random(folder: Path, rank: int) -> None:
    file = folder / f"random-{rank}.safetensors"
    if not file.is_file():
        raise UserError(
            f"{folder} was written by fewer processes than run now: it has no random state for process {rank}. Resume "
            "with the same number of processes."
        )
    with safe_open(file, framework="pt") as stored:
        host = json.loads(stored.metadata()["host"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a dict
    set_random_state(host | {"torch": tensors["torch"], "cuda": tensors.get("cuda")})
