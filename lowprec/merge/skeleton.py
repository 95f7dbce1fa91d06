"""The model without weights, with the adapter on it: what becomes of each tensor of the base.

Only the adapter's tensors are in memory. A base tensor is put into its layer, merged by PEFT's own code in fp32, and
taken out again.
"""

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lowprec.adapter import quiet_peft
from lowprec.errors import UserError

WEIGHTS = "adapter_model.safetensors"
_ADAPTER = "default"
_UNSUPPORTED = ("target_parameters", "trainable_token_indices", "layer_replication", "lora_bias", "use_bdlora")


class AdaptedSkeleton:
    """Tells which tensors of the base an adapter changes, and computes them."""

    def __init__(self, config: PreTrainedConfig, adapter: Path, *, trust_remote_code: bool = False):
        """
        Raises:
            UserError: the folder holds no LoRA adapter, or one for another model.
        """
        lora = _lora_config(adapter)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self.names = set(model.state_dict())
        self.architecture = type(model).__name__
        self.prefix = model.base_model_prefix
        self.tied = dict(model.all_tied_weights_keys)
        """A tensor that is another one -> that other one."""
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        # PEFT brings an adapter to its layer's device and dtype: the meta device would lose its values and bf16 their
        # digits. So every weight is one fp32 zero, spread over its shape without taking memory.
        model._apply(lambda tensor: torch.zeros(()).expand(tensor.shape))
        self._layers: dict[str, LoraLayer] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        values = _load(adapter)
        model.name_or_path = lora.base_model_name_or_path or ""
        try:
            with quiet_peft():
                peft_model = get_peft_model(model, lora, _ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
                loaded: Any = set_peft_model_state_dict(peft_model, values, _ADAPTER, low_cpu_mem_usage=True)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(_other_model(adapter, " ".join(str(error).split())[:500])) from error
        if loaded.unexpected_keys:
            raise UserError(_other_model(adapter, f"the model has no place for {loaded.unexpected_keys[0]}"))
        self._collect(peft_model.get_base_model(), adapter)
        for name, value in values.items():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if plain in self.names and plain.endswith(".bias"):
                self._replaced[plain] = value
        self._separate = not lora.ensure_weight_tying

    @property
    def num_layers(self) -> int:
        """Layers with a low-rank update."""
        return len(self._layers)

    @property
    def num_replaced(self) -> int:
        """Tensors that the adapter holds whole (``modules_to_save``, biases)."""
        return len(self._replaced)

    @property
    def changed(self) -> set[str]:
        return set(self._layers) | set(self._replaced)

    @property
    def untied(self) -> dict[str, str]:
        """Tied tensors that are two different ones from now on, since the adapter changes one of them."""
        if not self._separate:
            return {}
        return {name: other for name, other in self.tied.items() if {name, other} & self.changed}

    def merged(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The tensor after merging: fp32 where the adapter changes it, else ``base`` itself.

        Raises:
            UserError: shapes differ, or the result is not finite.
        """
        if name in self._replaced:
            return self._replaced[name]
        if name not in self._layers:
            return base
        if base.shape != self._shapes[name]:
            shapes = f"{list(base.shape)}, and the adapter was made for {list(self._shapes[name])}"
            raise UserError(f"{name} of the base has the shape {shapes}. Name the base it was trained on with --base.")
        layer = self._layers[name]
        inner = layer.get_base_layer()
        weightless = inner.weight
        inner.weight = nn.Parameter(base.float(), requires_grad=False)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"The adapter's update of {name} holds NaN or infinity; it cannot be merged.") from error
        result = inner.weight.data
        inner.weight = weightless
        layer.merged_adapters.clear()
        return result

    def _collect(self, model: nn.Module, adapter: Path) -> None:
        """Sort the adapter's modules into updates of layers and whole replacements."""
        for path, module in model.named_modules():
            plain = path.replace(".base_layer", "")
            if isinstance(module, LoraLayer):
                self._layers[f"{plain}.weight"] = module
                for name, parameter in cast(nn.Module, module).named_parameters():
                    if parameter.is_meta:
                        raise UserError(_other_model(adapter, f"its file has no {name} for {plain}"))
            elif isinstance(module, ModulesToSaveWrapper):
                copy = module.modules_to_save[_ADAPTER]
                self._replaced |= {f"{plain}.{leaf}": p.data for leaf, p in copy.named_parameters()}


def _lora_config(adapter: Path) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{adapter / 'adapter_config.json'} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{adapter} holds an adapter of type {config.peft_type}, and only LoRA and DoRA can be merged.")
    used = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if used:
        raise UserError(
            f"{adapter} uses {', '.join(used)}, which this merge does not handle; PEFT's merge_and_unload does, with "
            "the whole model in memory."
        )
    return config


def _load(adapter: Path) -> dict[str, torch.Tensor]:
    file = adapter / WEIGHTS
    if not file.is_file():
        raise UserError(
            f"{adapter} has no {WEIGHTS}. Adapters in pickled files (.bin) are not read, since unpickling can run any "
            "code; save it again with PEFT, which writes safetensors."
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut off ({error}).") from error
    return {name: tensor.float() for name, tensor in tensors.items()}


def _other_model(adapter: Path, reason: str) -> str:
    return f"The adapter in {adapter} was made for another model: {reason}. Name the right base with --base."
