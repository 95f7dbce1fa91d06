"""Save and load the states of any optimizer: lowprec's own, torch's and bitsandbytes' (8-bit and paged ones too).

Two files, no pickle: ``optimizer.json`` holds settings, parameter names and plain values, ``states.safetensors`` the
tensors as ``<parameter>.<key>``, bit for bit. An optimizer that has ``save_states`` and ``load_states`` writes its own.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowprec.errors import UserError
from lowprec.optim.arguments import number
from lowprec.optim.states_io import HEADER_FILE, apply_settings, settings, sync_file, write_json

STATES_FILE = "states.safetensors"


def save_optimizer_states(optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Write the optimizer's settings and states into ``folder`` (made where missing), durably."""
    if hasattr(optimizer, "save_states"):
        optimizer.save_states(folder)
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, params, _ = number(optimizer.param_groups)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    if params and params[0].is_cuda:
        torch.cuda.synchronize()  # paged states are host memory to torch, and a kernel may still be writing to them
    for name, param in zip(names, params, strict=True):
        values[name] = {}
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                values[name][key] = value
    save_file(tensors, folder / STATES_FILE)
    sync_file(folder / STATES_FILE)
    header = {"class": type(optimizer).__name__, "values": values}
    write_json(folder / HEADER_FILE, header | {"groups": [settings(group) for group in optimizer.param_groups]})


def load_optimizer_states(optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Continue from a folder of ``save_optimizer_states``. Raises UserError where its optimizer or model is another."""
    if hasattr(optimizer, "load_states"):
        optimizer.load_states(folder)
        return
    folder = Path(folder)
    if not (folder / HEADER_FILE).exists():
        raise UserError(
            f"{folder} holds no complete optimizer states ({HEADER_FILE} is missing): resume from another one."
        )
    header = json.loads((folder / HEADER_FILE).read_text())
    if header.get("class") != type(optimizer).__name__:
        raise UserError(
            f"{folder} holds states of {header.get('class', 'lowprec.AdamW')}, but this run uses "
            f"{type(optimizer).__name__}: resume with the optimizer of the saved run."
        )
    names, params, _ = number(optimizer.param_groups)
    if set(names) != set(header["values"]):
        odd = sorted(set(names) ^ set(header["values"]))
        raise UserError(f"{folder} holds states of other parameters than this run has, for example {odd[0]}.")
    apply_settings(optimizer.param_groups, header["groups"], folder)
    tensors: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in load_file(folder / STATES_FILE).items():
        name, _, key = full_name.rpartition(".")
        tensors.setdefault(name, {})[key] = tensor
    for name, param in zip(names, params, strict=True):
        saved = tensors.get(name, {})
        if saved or header["values"][name]:
            optimizer.state[param] = {k: _place(optimizer, k, t, param) for k, t in saved.items()} | header["values"][
                name
            ]


def _place(optimizer: torch.optim.Optimizer, key: str, saved: Tensor, param: Tensor) -> Tensor:
    """A state tensor where it is expected: in managed memory, beside the parameter, or (``step``) on the host."""
    if key in ("state1", "state2") and hasattr(optimizer, "get_state_buffer"):
        target = optimizer.get_state_buffer(param, dtype=saved.dtype)
        return target.copy_(saved)
    if key == "step" and not any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
        return saved
    return saved.to(param.device)
