"""The base's tensors one at a time: from safetensors files, which are never loaded whole, or from a model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from lowprec.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class BaseTensors(Protocol):
    layout: dict[str, torch.Tensor]
    """Name in the model -> shape and dtype, as a tensor on the meta device."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor itself, on the CPU. It must not be written to."""


class FileTensors:
    """Tensors of a Hugging Face folder, under the names that the model gives them."""

    def __init__(self, folder: Path, model_names: set[str], prefix: str):
        """``prefix`` is the model's ``base_model_prefix``, which some checkpoints leave out of their names."""
        self.layout: dict[str, torch.Tensor] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for file in _weight_files(folder):
            try:
                with safe_open(file, framework="pt") as stored:
                    for stored_name in stored.keys():  # noqa: SIM118  not a dict
                        view = stored.get_slice(stored_name)
                        if view.get_dtype() not in _DTYPES:
                            raise UserError(f"{file}: {stored_name} is of dtype {view.get_dtype()}: not a 16-bit base.")
                        name = _model_name(stored_name, model_names, prefix)
                        dtype = _DTYPES[view.get_dtype()]
                        self.layout[name] = torch.empty(view.get_shape(), dtype=dtype, device="meta")
                        self._places[name] = (file, stored_name)
            except SafetensorError as error:
                raise UserError(f"{file} is damaged or cut off ({error}). Copy the base model again.") from error

    def read(self, name: str) -> torch.Tensor:
        file, stored_name = self._places[name]
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor(stored_name)


class LoadedTensors:
    """Tensors of a model in memory: a GGUF file, or files whose names transformers translates while loading."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._tensors = dict(model.named_parameters()) | _saved_buffers(model)
        self.layout = {name: tensor.detach().to("meta") for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


def _weight_files(folder: Path) -> Iterable[Path]:
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE]
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder}: {INDEX} names files that are not there ({', '.join(missing[:3])}). Copy them too.")
    return [folder / file for file in files]


def _model_name(stored: str, model_names: set[str], prefix: str) -> str:
    candidates = (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in model_names), stored)


def _saved_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in model.state_dict() if name in buffers}
