"""The recipe's group ``adapter``: none, or LoRA by PEFT.

LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + scaling B A dropout(x), with W frozen and scaling = alpha / r
(rsLoRA: alpha / sqrt(r)). A, B and the copies of ``modules_to_save`` are fp32 for the optimizer; under autocast their
products run in the model's dtype.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import nn

from lowprec.errors import UserError
from lowprec.model import Model
from lowprec.model_source import resolve_source
from lowprec.option import option

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lowprec.lora import FuseReport

ALL_LINEAR = "all-linear"


@option("adapter", "none")
@dataclass(kw_only=True, slots=True)
class NoAdapter:
    """Train the model's own weights."""

    option_name: ClassVar[str]

    def attach(self, model: "PreTrainedModel") -> "PreTrainedModel":
        return model

    def fuse(self, model: "PreTrainedModel") -> None:
        """There is nothing to fuse."""

    def save(self, model: "PreTrainedModel", folder: Path, options: Model) -> None:
        """Write the whole model as plain transformers reads it."""
        model.save_pretrained(folder)


@option("adapter", "lora")
@dataclass(kw_only=True, slots=True)
class Lora:
    """Keys and meanings are those of PEFT's ``LoraConfig``."""

    option_name: ClassVar[str]

    r: int = 16
    """Rank: columns of B, rows of A."""
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: Any = ALL_LINEAR
    """``all-linear`` (every linear layer but the output head), a list of names, or a regular expression."""
    use_dora: bool = False
    """Train each weight's magnitudes apart from its direction (arXiv:2402.09353)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    modules_to_save: list[str] | None = None
    """Names of modules, such as ``lm_head``, of which a whole copy is trained and saved with the adapter."""
    bias: str = "none"
    """``none``, ``all`` or ``lora_only``: which biases of the base model are trained with it."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers: name or regular expression -> r."""
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    fused: bool = True
    """Compute the projections of one input together, by one function that keeps the least for backward
    (docs/lora.md). What it cannot compute (dropout, DoRA, ...) takes PEFT's path, and the report says so;
    so do layers that train.torch_compile compiles."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1:
            raise UserError(f"adapter.r={self.r} and adapter.lora_alpha={self.lora_alpha} must be at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"adapter.lora_dropout={self.lora_dropout} must be at least 0 and below 1.")
        if self.bias not in ("none", "all", "lora_only"):
            raise UserError(f"adapter.bias={self.bias} is not one of none, all, lora_only.")
        targets = self.target_modules
        names = targets if isinstance(targets, list) else [targets]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise UserError(
                f"adapter.target_modules={targets} must be all-linear, a list of names such as [q_proj,v_proj], or a "
                "regular expression."
            )

    def attach(self, model: "PreTrainedModel") -> "PeftModel":
        """Freeze ``model`` and put LoRA on it. The layers below may already be quantised.

        Gradient checkpointing has to be the kind without re-entry (``use_reentrant=False``): the other one passes no
        gradient where the first layer's input asks for none, as with a frozen embedding.

        Raises:
            UserError: a name in ``target_modules`` or ``modules_to_save`` matches nothing in this model.
        """
        import bitsandbytes as bnb
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        targeted = _targeted(model, self.target_modules)
        _check_modules_to_save(model, self.modules_to_save or [])
        if any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()):
            model.is_loaded_in_4bit = True  # type: ignore[assignment]  # by this mark PEFT chooses its layer for 4-bit bases
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            modules_to_save=self.modules_to_save,
            bias=cast("Literal['none', 'all', 'lora_only']", self.bias),
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in targeted),
        )
        dtype = model.dtype
        with quiet_peft():
            peft_model = get_peft_model(model, config)
        _train_in_fp32(peft_model, dtype)
        return peft_model

    def fuse(self, model: "PeftModel") -> "FuseReport | None":
        """Switch the layers of ``model``, which is on its device, to the fused product; None with ``fused=False``."""
        from lowprec.lora import fuse

        return fuse(model) if self.fused else None

    def save(self, model: "PeftModel", folder: Path, options: Model) -> None:
        """Write ``adapter_model.safetensors`` in fp32, as trained, and ``adapter_config.json``, which names the base.

        Plain PEFT loads it: ``PeftModel.from_pretrained(base, folder)``.
        """
        source = resolve_source(options.model_name_or_path)
        config = model.peft_config["default"]
        # A relative path would be right in this working folder alone.
        config.base_model_name_or_path = str(source.path) if source.is_path else source.name
        config.revision = options.revision
        model.save_pretrained(str(folder), save_embedding_layers=False)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what PEFT and transformers say to each other about their own renamed attributes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _train_in_fp32(model: "PeftModel", dtype: torch.dtype) -> None:
    """Bring every trained tensor to fp32, and what trained copies give back to the model's own dtype."""
    from peft.utils import ModulesToSaveWrapper

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))


def _targeted(model: nn.Module, targets: str | list[str]) -> list[nn.Module]:
    """The layers that ``target_modules`` names, by PEFT's rule: a whole name or the end of one after a dot."""
    from transformers.pytorch_utils import Conv1D

    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, Conv1D))}
    if targets == ALL_LINEAR:
        return [m for m in layers.values() if not isinstance(m, nn.Embedding)]
    if isinstance(targets, str):
        try:
            matched = {n: m for n, m in layers.items() if re.fullmatch(targets, n)}
        except re.error as error:
            raise UserError(f"adapter.target_modules={targets} is no regular expression: {error}.") from error
        if not matched:
            raise UserError(_nothing_matches("target_modules", targets, list(layers)))
        return list(matched.values())
    matched = {}
    for target in targets:
        found = {n: m for n, m in layers.items() if n == target or n.endswith("." + target)}
        if not found:
            raise UserError(_nothing_matches("target_modules", target, list(layers)))
        matched |= found
    return list(matched.values())


def _check_modules_to_save(model: nn.Module, names: list[str]) -> None:
    modules = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters())]
    for name in names:
        if not any(n == name or n.endswith("." + name) for n in modules):
            raise UserError(_nothing_matches("modules_to_save", name, modules))


def _nothing_matches(key: str, name: str, modules: list[str]) -> str:
    """Name the kinds of layers there are (their last name parts) and the nearest to what was asked for."""
    kinds = sorted({module.rpartition(".")[2] for module in modules} - {"", *map(str, range(1000))})
    nearest = get_close_matches(name.rpartition(".")[2], kinds, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return f"adapter.{key}: '{name}' matches no layer of this model.{hint} There are: {', '.join(kinds)}."
