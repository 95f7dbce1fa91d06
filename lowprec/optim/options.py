"""The recipe groups ``optimizer`` and ``state_store``, and the learning rate's schedule."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeGuard

import torch
from torch import nn
from transformers.optimization import GreedyLR

from lowprec.errors import UserError
from lowprec.optim.adamw import AdamW
from lowprec.optim.format import MASTERS, STATE_DTYPES, StateFormat
from lowprec.optim.groups import decay_groups
from lowprec.option import option

# Below this many bytes a step's states move faster than a disk answers twice: see docs/optimizer.md.
SMALL_STATES = 256 << 20


@option("state_store", "gpu")
@dataclass(kw_only=True, slots=True)
class GpuStore:
    """States beside the weights."""

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``AdamW`` that choose this store."""
        return {"state_store": "gpu"}


@option("state_store", "cpu")
@dataclass(kw_only=True, slots=True)
class CpuStore:
    """States in pinned host memory, brought to the weights' device for the update."""

    def arguments(self) -> dict[str, Any]:
        return {"state_store": "cpu"}


@option("state_store", "ssd")
@dataclass(kw_only=True, slots=True)
class SsdStore:
    """States on one or several disks."""

    path: Any = None
    """Folder on the disk, or a list of folders on different disks to stripe over."""
    pinned_gib: float = 2.0
    """The most host memory that its buffers take."""
    drive_tbw: float | None = None
    """TB that the maker says can be written to the drive; the report shows the run's share."""
    reserve_checkpoints: int = 1
    """Checkpoints on the same disk whose space is reserved at the start."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("state_store=ssd needs a folder on the disk: set state_store.path=/mnt/nvme/states.")
        if self.pinned_gib <= 0:
            raise UserError(f"state_store.pinned_gib={self.pinned_gib} must be above 0.")
        if self.drive_tbw is not None and self.drive_tbw <= 0:
            raise UserError(f"state_store.drive_tbw={self.drive_tbw} must be above 0, or null where it is not known.")
        if self.reserve_checkpoints < 0:
            raise UserError(f"state_store.reserve_checkpoints={self.reserve_checkpoints} must be at least 0.")

    def arguments(self) -> dict[str, Any]:
        names = ("path", "pinned_gib", "drive_tbw", "reserve_checkpoints")
        return {"state_store": "ssd"} | {name: getattr(self, name) for name in names}


@dataclass(kw_only=True, slots=True)
class OptimizerOptions:
    """What all optimizers share; the keys are those of ``transformers.TrainingArguments``."""

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    lr_scheduler_type: str = "linear"
    """Any schedule of ``transformers.get_scheduler``."""
    warmup_ratio: float = 0.0
    """Share of the run's steps over which the rate rises from 0."""
    warmup_steps: int = 0
    """The same in steps; above 0 it goes before ``warmup_ratio``."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the schedule takes beyond the numbers of steps, such as ``num_cycles``."""

    def __post_init__(self) -> None:
        if self.lr_scheduler_type not in schedule_names():
            raise UserError(
                f"optimizer.lr_scheduler_type={self.lr_scheduler_type} is unknown: choose one of "
                f"{', '.join(schedule_names())}."
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"optimizer.warmup_ratio={self.warmup_ratio} must be between 0 and 1.")
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1.")

    def build(self, model: nn.Module, state_store: Any) -> torch.optim.Optimizer:
        """The optimizer of the parameters of ``model`` that train; ``state_store`` is an option of that group."""
        raise NotImplementedError

    def warnings(self, model: nn.Module, state_store: Any) -> list[str]:
        """What a user should know of this choice for this model, one paragraph each."""
        return []

    def _adam(self) -> dict[str, Any]:
        betas = (self.adam_beta1, self.adam_beta2)
        return {"lr": self.learning_rate, "betas": betas, "eps": self.adam_epsilon, "weight_decay": self.weight_decay}


@option("optimizer", "adamw")
@dataclass(kw_only=True, slots=True)
class AdamWOptions(OptimizerOptions):
    """``lowprec.AdamW``."""

    state_dtype: str = "fp32"
    """Of both moments: fp32, bf16 or int8."""
    master: str = "fp32"
    """Of bf16 weights: fp32 (a whole master), split (the 16 bits that a bf16 weight lacks: the same numbers, 2 bytes a
    parameter less) or none (stochastic rounding)."""

    def __post_init__(self) -> None:
        OptimizerOptions.__post_init__(self)
        for name, choices in (("state_dtype", STATE_DTYPES), ("master", MASTERS)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"optimizer.{name}={getattr(self, name)} is unknown: choose one of {', '.join(choices)}."
                )

    def build(self, model: nn.Module, state_store: Any) -> AdamW:
        arguments = {**self._adam(), **state_store.arguments(), "state_dtype": self.state_dtype, "master": self.master}
        return AdamW(decay_groups(model, self.weight_decay), **arguments)

    def warnings(self, model: nn.Module, state_store: Any) -> list[str]:
        notes = []
        trainable = [param for param in model.parameters() if param.requires_grad]
        if self.master == "none" and any(param.dtype == torch.bfloat16 for param in trainable):
            notes.append(
                "optimizer.master=none keeps no fp32 master of the bf16 weights: each update is rounded "
                "stochastically to "
                "bf16, which costs some loss. optimizer.master=split keeps the master exactly for 2 bytes a parameter."
            )
        states = sum(
            StateFormat.of("", param, self.state_dtype, self.master, amsgrad=False).nbytes(param.numel())
            for param in trainable
        )
        if isinstance(state_store, SsdStore) and states < SMALL_STATES:
            notes.append(
                f"state_store=ssd: the {sum(param.numel() for param in trainable):,} parameters that train have about "
                f"{states / 2**20:.0f} MiB of states, too little to be worth a disk's time and wear: "
                "state_store=gpu is faster."
            )
        return notes


@dataclass(kw_only=True, slots=True)
class BitsAndBytesOptions(OptimizerOptions):
    """What the optimizers of bitsandbytes share."""

    option_name: ClassVar[str]
    class_name: ClassVar[str]

    def check(self, recipe: Any) -> None:
        """Called before anything is loaded. Raises UserError where ``recipe.state_store`` is not ``gpu``."""
        if not isinstance(recipe.state_store, GpuStore):
            raise UserError(
                f"optimizer={self.option_name} keeps its states itself and cannot use state_store="
                f"{recipe.state_store.option_name}: choose optimizer=adamw (with optimizer.state_dtype=int8 for 8-bit "
                "states), or state_store=gpu."
            )

    def build(self, model: nn.Module, state_store: Any) -> torch.optim.Optimizer:
        import bitsandbytes  # imported here: it looks for CUDA

        optimizer = getattr(bitsandbytes.optim, self.class_name)
        return optimizer(decay_groups(model, self.weight_decay), **self._adam())

    def warnings(self, model: nn.Module, state_store: Any) -> list[str]:
        if not any(param.requires_grad and param.dtype != torch.float32 for param in model.parameters()):
            return []
        return [
            f"optimizer={self.option_name} updates weights of 16 bits in place and keeps no fp32 master: updates "
            "below half "
            "a unit in the last place are lost. optimizer=adamw optimizer.state_dtype=int8 keeps them for 2 bytes a "
            "parameter."
        ]


@option("optimizer", "adamw_8bit")
@dataclass(kw_only=True, slots=True)
class AdamW8bitOptions(BitsAndBytesOptions):
    """bitsandbytes' AdamW with block-wise 8-bit states."""

    class_name: ClassVar[str] = "AdamW8bit"


@option("optimizer", "paged_adamw")
@dataclass(kw_only=True, slots=True)
class PagedAdamWOptions(BitsAndBytesOptions):
    """bitsandbytes' AdamW with fp32 states in managed memory, which moves to the host where the GPU is full."""

    class_name: ClassVar[str] = "PagedAdamW"


@option("optimizer", "paged_adamw_8bit")
@dataclass(kw_only=True, slots=True)
class PagedAdamW8bitOptions(BitsAndBytesOptions):
    """bitsandbytes' AdamW with 8-bit states in managed memory."""

    class_name: ClassVar[str] = "PagedAdamW8bit"


def schedule_names() -> list[str]:
    """The schedules of transformers that a training loop can step."""
    from transformers.trainer_utils import SchedulerType

    return [kind.value for kind in SchedulerType]


def build_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of ``options`` over ``num_steps`` optimizer steps. Raises UserError naming the key at fault."""
    from transformers import get_scheduler

    warmup = options.warmup_steps or math.ceil(options.warmup_ratio * num_steps)
    if warmup > num_steps:
        raise UserError(f"optimizer.warmup_steps={warmup} is more than the run's {num_steps} steps: lower it.")
    try:
        return get_scheduler(options.lr_scheduler_type, optimizer, warmup, num_steps, dict(options.lr_scheduler_kwargs))
    except (TypeError, ValueError) as error:
        from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
        from transformers.trainer_utils import SchedulerType

        function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(options.lr_scheduler_type)]
        own = {"optimizer", "num_warmup_steps", "num_training_steps", "self"}
        accepted = [name for name in inspect.signature(function).parameters if name not in own]  # type: ignore[arg-type]
        raise UserError(
            f"optimizer.lr_scheduler_kwargs={dict(options.lr_scheduler_kwargs)} does not suit "
            "optimizer.lr_scheduler_type="
            f"{options.lr_scheduler_type}, which takes {', '.join(accepted) or 'none'} ({error})."
        ) from error


def follows_loss(schedule: Any) -> TypeGuard[torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR]:
    """Whether a schedule takes a step after every evaluation, by its loss, and none after a step of training."""
    return isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR)


def check_schedule(options: OptimizerOptions, num_steps: int) -> None:
    """Build the schedule for nothing, so that a mistake in its keys is told before any weight is loaded.

    Raises:
        UserError: as ``build_schedule``.
    """
    build_schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), options, num_steps)
