"""The recipe's group ``train``: how long, how large, what is saved and watched."""

from dataclasses import dataclass, field

from lowprec.errors import UserError
from lowprec.machine.footprint import WORLD_G_CO2E_PER_KWH

AUTO = "auto"
CHECKPOINTING = ("none", "full", "selective", "offload", AUTO)
"""Choices of ``gradient_checkpointing``; what they do is in :mod:`lowprec.activations`."""


@dataclass(kw_only=True, slots=True)
class Train:
    """Keys are spelled as in Hugging Face's ``TrainingArguments``."""

    output_dir: str | None = None
    """The run folder. None means ``runs/<recipe name>``."""
    max_steps: int | None = None
    """Optimizer steps. None means as many as ``num_train_epochs`` takes."""
    num_train_epochs: float = 1.0
    """Passes over the training data; read only where ``max_steps`` is None."""
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    find_batch_size: bool = False
    """Before the first step, replace the two above by the largest micro-batch that fits and the accumulation that keeps
    the effective batch."""
    gradient_checkpointing: str = "none"
    """What backward needs of a layer: ``none`` keeps all of it, ``full`` computes it again from the layer's input
    (about a third more computing for several times less memory), ``selective`` keeps what is dear to compute and cheap
    to hold, ``offload`` is ``full`` with the inputs in host memory, ``auto`` takes the fastest that fits. ``true`` is
    ``full``, ``false`` is ``none``."""
    offload_embeddings: bool = False
    """Frozen token embeddings stay in pinned host memory; the GPU reads the rows it needs over PCIe. One process, and
    embeddings that share no weight with the head; where they cannot, the run says why and moves nothing."""
    use_liger_kernel: bool = True
    """Liger's kernels for norms, gated MLPs and rotary embeddings of this run's model, where the device runs them."""
    cuda_graphs: bool | str = AUTO
    """Replay decoder layers as CUDA graphs, so that the host launches a layer at once. A shape of the batches that
    comes for the third time is recorded, up to eight; rows are padded so that few come (``data.pad_to_multiple_of``).
    The layers' memory stays taken between replays. ``auto`` does so on a CUDA device where it can, where the predicted
    memory is free, and where the padding costs less time than it saves (:mod:`lowprec.plan.settle`). The run says where
    there are none, and why; the report, what was not recorded."""
    torch_compile: bool = False
    """Compile the decoder layers, with ``gradient_checkpointing`` none or full."""
    max_grad_norm: float | None = 1.0
    """Exact clipping by the global norm; None turns it off."""
    seed: int = 42
    eval_steps: int | None = None
    """Evaluate and answer the sample prompts every so many steps. None: before the first and after the last only."""
    eval_max_samples: int | None = 512
    """Held-out samples an evaluation reads (the first of a fixed order); None reads all."""
    num_sample_answers: int = 1
    """Held-out prompts that the model answers at each evaluation."""
    sample_max_new_tokens: int = 64
    save_steps: int | None = None
    """Write a checkpoint every so many steps. None: only when interrupted."""
    save_total_limit: int | None = 2
    """Checkpoints kept; older ones are removed once a newer one is complete. None keeps all."""
    resume_from_checkpoint: str | None = None
    """``auto`` (the newest whole checkpoint in ``output_dir``, or the beginning), or a checkpoint folder."""
    report_to: list[str] = field(default_factory=lambda: [AUTO])
    """Trackers of Accelerate: ``auto`` is TensorBoard where installed; ``wandb``, ``mlflow``, ...; empty for none."""

    grid_g_co2e_per_kwh: float = WORLD_G_CO2E_PER_KWH
    """Grams of CO2 equivalent a kWh of the electricity here, for the report; by default the world's average."""

    def __post_init__(self) -> None:
        self.gradient_checkpointing = _policy(self.gradient_checkpointing)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"train.seed={self.seed} must be from 0 to {2**32 - 1}.")
        if self.torch_compile and self.gradient_checkpointing not in ("none", "full"):
            raise UserError(
                f"train.torch_compile=true does not work with train.gradient_checkpointing="
                f"{self.gradient_checkpointing}: choose none or full, or train.torch_compile=false."
            )
        self.cuda_graphs = _auto_or_bool("cuda_graphs", self.cuda_graphs)
        if self.torch_compile and self.cuda_graphs is True:
            raise UserError(
                "train.torch_compile=true and train.cuda_graphs=true: a layer is compiled or recorded, not both. Leave "
                "one of them out."
            )
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                    "sample_max_new_tokens"):  # fmt: skip
            _at_least_one(key, getattr(self, key))
        for key in ("max_steps", "eval_steps", "eval_max_samples", "save_steps", "save_total_limit"):
            if getattr(self, key) is not None:
                _at_least_one(key, getattr(self, key))
        if self.grid_g_co2e_per_kwh < 0:
            raise UserError(f"train.grid_g_co2e_per_kwh={self.grid_g_co2e_per_kwh} must be 0 or more.")
        if self.num_train_epochs <= 0:
            raise UserError(f"train.num_train_epochs={self.num_train_epochs} must be greater than 0.")
        if self.num_sample_answers < 0:
            raise UserError(f"train.num_sample_answers={self.num_sample_answers} must be 0 or more.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise UserError(
                f"train.max_grad_norm={self.max_grad_norm} must be greater than 0; train.max_grad_norm=null turns "
                "clipping off."
            )


def _policy(value: str) -> str:
    policy = {"true": "full", "false": "none"}.get(str(value).lower(), str(value))
    if policy not in CHECKPOINTING:
        raise UserError(
            f"train.gradient_checkpointing={value} is not one of {', '.join(CHECKPOINTING)}, true (full), false (none)."
        )
    return policy


def _auto_or_bool(key: str, value: bool | str) -> bool | str:
    choices: dict[str, bool | str] = {AUTO: AUTO, "true": True, "false": False}
    if str(value).lower() not in choices:
        raise UserError(f"train.{key}={value} is not one of auto, true, false.")
    return choices[str(value).lower()]


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise UserError(f"train.{key}={value} must be 1 or more.")
