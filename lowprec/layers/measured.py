"""What schemes that choose by measurement share: times of a layer, kept between runs, its noise, and the inputs and
errors of a calibration batch."""

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowprec.machine.timing import graph_milliseconds, milliseconds

KEPT_TOKENS = 1024
"""Tokens of the calibration batch on which the noise is measured."""


def verdict_folder() -> Path:
    """Where measured times are kept: ``$XDG_CACHE_HOME/lowprec/auto``, or ``~/.cache/lowprec/auto``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec" / "auto"


def remembered_times(device: torch.device, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """``measure()``, or what it gave before on this kind of machine, from the file of verdicts. The key says all that
    the times depend on but the device and the versions."""
    key = f"{_machine(device)}|{key}"
    path = verdict_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["ms"]
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or cut off by a power failure: measured anew
        pass
    ms = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"key": key, "ms": ms}), encoding="utf-8")
    partial.replace(path)
    return ms


def milliseconds_of(layer: nn.Linear, tokens: int, frozen: bool, in_graphs: bool = False) -> float:
    """ms of forward and backward of a layer: of its kernels in a CUDA graph, or as the host launches them."""
    weight, dtype = layer.weight, _dtype(layer)
    x = torch.randn(tokens, layer.in_features, device=weight.device).to(dtype).requires_grad_()
    error = torch.randn(tokens, layer.out_features, device=weight.device).to(dtype)
    wanted = [x] if frozen else [x, layer.weight]

    def step() -> None:
        torch.autograd.grad(layer(x), wanted, error)

    if in_graphs and weight.is_cuda:
        return graph_milliseconds(step, repeats=12)
    return milliseconds(step, device=weight.device)


def layer_noise_db(
    layer: nn.Linear, weight: torch.Tensor, x: torch.Tensor, error: torch.Tensor, with_weight: bool = False
) -> tuple[float, ...]:
    """Signal to noise in dB of a layer's output, input gradient and (``with_weight``) weight gradient, pooled over
    tokens, against the products of ``weight`` in fp32.

    Args:
        weight: ``[out, in]``, what the layer's weight stands for.
        x: inputs ``[tokens, in]``.
        error: gradients of the loss with respect to the outputs, ``[tokens, out]``.
    """
    x = x.detach().to(weight.device).clone().requires_grad_()
    error = error.to(weight.device)
    y = layer(x)
    bias = layer.bias
    wide_x, wide_w, wide_e = x.detach().float(), weight.detach().float(), error.float()
    pairs = [(wide_x @ wide_w.t() + (0 if bias is None else bias.detach().float()), y)]
    gradients = torch.autograd.grad(y, [x, layer.weight] if with_weight else [x], error.to(y.dtype))
    pairs += zip((wide_e @ wide_w, wide_e.t() @ wide_x), gradients, strict=False)
    return tuple(_db(reference, found.detach().float()) for reference, found in pairs)


def _db(reference: torch.Tensor, found: torch.Tensor) -> float:
    noise = (reference - found).square().sum().double()
    return float(10 * torch.log10(reference.square().sum().double() / noise)) if noise > 0 else float("inf")


def normal_sample(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal numbers as input and error, for want of a calibration batch. They flatter every scheme."""
    generator = torch.Generator().manual_seed(0)
    sizes = (linear.in_features, linear.out_features)
    x, error = (torch.randn(256, n, generator=generator).to(linear.weight.device, _dtype(linear)) for n in sizes)
    return x, error


def _dtype(linear: nn.Linear) -> torch.dtype:
    """What it computes in: a 4-bit layer's weight does not say."""
    return getattr(linear, "compute_dtype", None) or linear.weight.dtype


def record(model: nn.Module, linears: dict, calibration: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and errors of every layer in one forward and backward pass; the gradients of the model stay as they
    were."""
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])[:KEPT_TOKENS]
            seen[name] = [x]
            if output.requires_grad:
                output.register_hook(
                    lambda error: seen[name].append(error.detach().reshape(-1, error.shape[-1])[:KEPT_TOKENS])
                )

        return hook

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(watch(name)) for name in linears]
    kept = {p: (p.grad, p.requires_grad) for p in model.parameters()}
    try:
        entrance = getattr(model, "get_input_embeddings", lambda: None)()
        for p in model.parameters():
            p.grad = None
            # Errors of layers need no gradient of a weight, which would take as much memory as the model.
            p.requires_grad_(p.is_floating_point() and entrance is None)
        if entrance is not None:
            hooks.append(entrance.register_forward_hook(lambda module, args, output: output.requires_grad_()))
        batch = dict(calibration)
        if "labels" not in batch and "input_ids" in batch:
            batch["labels"] = batch["input_ids"]
        with torch.enable_grad():
            model(**batch).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for p, (grad, wanted) in kept.items():
            p.requires_grad_(wanted)
            p.grad = grad
    return {name: (tensors[0], tensors[1]) for name, tensors in seen.items() if len(tensors) == 2}


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = version("triton") if find_spec("triton") else "none"
    return f"{name}|torch {torch.__version__}|triton {triton}"
