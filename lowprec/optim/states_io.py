"""Optimizer states as files: ``optimizer.json`` and safetensors shards keyed by parameter name."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowprec.errors import UserError
from lowprec.optim.format import StateFormat

HEADER_FILE = "optimizer.json"
VERSION = 1
SHARD_BYTES = 1 << 30


@dataclass
class Header:
    """What ``optimizer.json`` holds: settings, the parameters with shapes, steps and formats, where the states are.

    ``shards`` maps ``<parameter>.<field>`` to a file; ``store`` is the manifest of a store that keeps files of its own.
    """

    groups: list[dict[str, Any]]
    parameters: dict[str, dict[str, Any]]
    shards: dict[str, str] = field(default_factory=dict)
    store: dict[str, Any] | None = None
    version: int = VERSION

    def numel_of(self, name: str) -> int:
        return math.prod(self.parameters[name]["shape"])

    def format_of(self, name: str) -> StateFormat:
        return StateFormat.from_json(self.parameters[name]["format"])


def settings(group: dict[str, Any]) -> dict[str, Any]:
    """The JSON-able settings of a parameter group."""
    rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in rest.items()}


def apply_settings(groups: list[dict[str, Any]], saved: list[dict[str, Any]], folder: Path) -> None:
    """Put saved settings back into the groups of an optimizer."""
    if len(groups) != len(saved):
        raise UserError(f"{folder} holds {len(saved)} parameter groups, but the optimizer has {len(groups)}.")
    for group, values in zip(groups, saved, strict=True):
        for key, value in values.items():
            if key == "param_names":
                continue  # the optimizer's own stay: they have been checked against the saved parameters
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)  # a graph may have captured it
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file under another name, make it durable, and only then call it by its own."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_header(folder: Path, header: Header) -> None:
    write_json(folder / HEADER_FILE, asdict(header))


def read_header(folder: Path) -> Header:
    """Raises UserError where the folder holds no complete optimizer states."""
    path = folder / HEADER_FILE
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no complete optimizer states ({HEADER_FILE} is missing): resume from a checkpoint that "
            "does."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): resume from another checkpoint.") from None
    if values.get("version") != VERSION:
        raise UserError(
            f"{path} has version {values.get('version')}, but this lowprec reads version {VERSION}: resume with the "
            "lowprec that wrote it."
        )
    return Header(**values)


def write_shards(folder: Path, states: Iterable[tuple[str, dict[str, Tensor]]]) -> dict[str, str]:
    """Write fields of parameters to shards of about ``SHARD_BYTES``; returns ``<parameter>.<field>`` -> file name."""
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def close() -> None:
        nonlocal shard
        if shard:
            name = f"states-{len(set(files.values())):05d}.safetensors"
            save_file(shard, folder / name)
            sync_file(folder / name)
            files.update(dict.fromkeys(shard, name))
            shard = {}

    for name, fields in states:
        for key, tensor in fields.items():
            shard[f"{name}.{key}"] = tensor
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            close()
    close()
    return files


class Shards:
    """Reads what ``write_shards`` wrote, one parameter at a time."""

    def __init__(self, folder: Path, files: dict[str, str]):
        self._files: dict[str, dict[str, str]] = {}
        for key, file in files.items():
            name, _, state = key.rpartition(".")
            self._files.setdefault(name, {})[state] = file
        self._open = {}
        for file in sorted(set(files.values())):
            if not (folder / file).exists():
                raise UserError(
                    f"{folder / file} is missing, which {HEADER_FILE} names: resume from another checkpoint."
                )
            self._open[file] = safe_open(folder / file, framework="pt")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def fields_of(self, name: str) -> dict[str, Tensor]:
        return {key: self._open[file].get_tensor(f"{name}.{key}") for key, file in self._files.get(name, {}).items()}


def check_parameters(folder: Path, header: Header, numels: dict[str, int], formats: dict[str, StateFormat]) -> None:
    """The saved parameters must be the optimizer's: the same names, sizes and formats."""
    missing, surplus = (
        sorted(numels.keys() - header.parameters.keys()),
        sorted(header.parameters.keys() - numels.keys()),
    )
    if missing or surplus:
        raise UserError(
            f"The optimizer states in {folder} belong to other parameters: "
            + "; ".join(
                f"{len(names)} {what}, the first {names[0]}"
                for names, what in ((missing, "have no saved states"), (surplus, "are not in this run"))
                if names
            )
            + ". Resume with the model, adapter and frozen layers of the saved run."
        )
    for name, numel in numels.items():
        if header.numel_of(name) != numel:
            raise UserError(
                f"{folder}: parameter {name} was saved with {header.numel_of(name)} elements, but has {numel} now: "
                "resume with the model of the saved run."
            )
        if header.format_of(name) != formats[name]:
            raise UserError(
                f"{folder}: the states of {name} were saved as {header.format_of(name)}, but this run keeps "
                f"{formats[name]}: "
                "resume with the model.dtype, optimizer.state_dtype and optimizer.master of the saved run."
            )


def check_fields(name: str, numel: int, format: StateFormat, fields: dict[str, Any]) -> None:
    """The states given for a parameter must be those of its format."""
    for state in format.fields:
        tensor = fields.get(state.name)
        if tensor is None or tensor.dtype != state.dtype or tensor.nbytes != state.nbytes(numel):
            given = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise UserError(
                f"The loaded states of {name} do not fit: {state.name} should be {state.dtype} for {numel} "
                "elements, got "
                f"{given}. Load them with the state_dtype, master and weight dtype that they were saved with."
            )


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # a folder's entries are made durable in the same way
