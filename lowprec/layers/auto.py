"""``auto``: for each distinct layer shape the fastest scheme whose noise is within a bound, by measurement on this
machine.

Times: forward and backward of one layer at ``tokens`` tokens, on the device that the weights are on. Noise: the output
and both gradients of a calibration batch (inputs and errors of every layer, from one pass of the model), pooled, in dB
against fp32 products. Without a calibration batch the inputs are normal numbers, which flatter every scheme; the report
says so. Verdicts on time are kept in a file keyed by GPU, versions and shape.
"""

import copy
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lowprec.errors import UserError
from lowprec.layers.eight_bit_schemes import EightBit, Fp8, Fp8Hadamard, Int8Hadamard
from lowprec.machine.timing import milliseconds
from lowprec.option import option

CANDIDATES: tuple[type[EightBit], ...] = (Fp8, Fp8Hadamard, Int8Hadamard)
KEPT_TOKENS = 1024
"""Tokens of the calibration batch on which the noise is measured."""


@option("weights", "auto")
@dataclass(kw_only=True, slots=True)
class Auto:
    """The fastest of bf16, fp8, fp8_hadamard and int8_hadamard for each shape, within a bound on its noise."""

    option_name: ClassVar[str]

    tokens: int = 4096
    """Tokens of a micro-batch, for which the candidates are timed."""
    min_sqnr_db: float = 20.0
    """The least signal to noise, in dB, of output, input gradient and weight gradient."""
    layout: str = "one"
    """As in the 8-bit schemes."""
    cache: str = "none"
    """As in the 8-bit schemes."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"weights.tokens={self.tokens} must be at least 1.")
        Fp8(cache=self.cache, layout=self.layout)  # checks both

    def why_not(self, linear: nn.Linear, frozen: bool) -> str | None:
        raise AssertionError("choose() replaces this scheme before a layer is converted")

    convert = kernel = why_not

    def choose(
        self, model: nn.Module, linears: dict[str, tuple[nn.Linear, bool]], calibration: Any
    ) -> dict[str, tuple[EightBit | None, str]]:
        """Layer name -> the scheme (None: 16 bits) and the reason, with what was measured."""
        samples = _record(model, linears, calibration) if calibration is not None else {}
        times: dict[tuple, dict[str, float]] = {}
        verdicts = {}
        for name, (linear, frozen) in linears.items():
            key = (linear.out_features, linear.in_features, frozen, linear.weight.dtype)
            if key not in times:
                times[key] = self._times(linear, frozen)
            verdicts[name] = self._verdict(linear, frozen, times[key], samples.get(name))
        return verdicts

    def _schemes(self, linear: nn.Linear, frozen: bool) -> list[EightBit]:
        schemes = [scheme(cache=self.cache, layout=self.layout) for scheme in CANDIDATES]
        return [scheme for scheme in schemes if scheme.why_not(linear, frozen) is None]

    def _verdict(self, linear, frozen, times, sample) -> tuple[EightBit | None, str]:
        plain = times["bf16"]
        schemes = sorted(self._schemes(linear, frozen), key=lambda scheme: times[scheme.option_name])
        if not schemes:
            return None, Fp8().why_not(linear, frozen) or ""
        notes = []
        for scheme in schemes:
            took = times[scheme.option_name]
            if took >= plain:
                notes.append(f"{scheme.option_name} {plain / took:.2f}x")
                continue
            worst = min(noise_db(linear, scheme, frozen, *(sample or _normal(linear))))
            if worst < self.min_sqnr_db:
                notes.append(f"{scheme.option_name} {worst:.0f} dB is under {self.min_sqnr_db:.0f}")
                continue
            measured = "" if sample else " on normal numbers (no calibration batch)"
            return scheme, f"{plain / took:.2f}x bf16 at {self.tokens} tokens, {worst:.0f} dB{measured}"
        return None, f"16 bits are best at {self.tokens} tokens: {', '.join(notes)}"

    def _times(self, linear: nn.Linear, frozen: bool) -> dict[str, float]:
        """Scheme -> ms of forward and backward, from the file of verdicts where it knows them."""
        device = linear.weight.device
        key = "|".join(map(str, (_machine(device), linear.out_features, linear.in_features, linear.weight.dtype)))
        key += f"|{frozen}|{self.tokens}|{self.layout}|{self.cache}"
        path = verdict_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return kept["ms"]
        plain = copy.deepcopy(linear).requires_grad_(not frozen)
        ms = {"bf16": _time(plain, self.tokens, frozen)}
        for scheme in self._schemes(linear, frozen):
            ms[scheme.option_name] = _time(scheme.convert(copy.deepcopy(plain), frozen), self.tokens, frozen)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"key": key, "ms": ms}), encoding="utf-8")
        partial.replace(path)
        return ms


def verdict_folder() -> Path:
    """Where measured times are kept: ``$XDG_CACHE_HOME/lowprec/auto``, or ``~/.cache/lowprec/auto``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec" / "auto"


def noise_db(
    linear: nn.Linear, scheme: EightBit, frozen: bool, x: torch.Tensor, error: torch.Tensor
) -> tuple[float, ...]:
    """Signal to noise in dB of output, input gradient and (where trained) weight gradient, pooled over tokens.

    Args:
        x: inputs ``[tokens, in]``.
        error: gradients of the loss with respect to the outputs, ``[tokens, out]``.
    """
    layer = scheme.convert(copy.deepcopy(linear).requires_grad_(not frozen), frozen)
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    bias = linear.bias
    wide_x, wide_w, wide_e = x.detach().float(), linear.weight.detach().float(), error.float()
    pairs = [(wide_x @ wide_w.t() + (0 if bias is None else bias.detach().float()), y)]
    wanted = [x] if frozen else [x, layer.weight]
    gradients = torch.autograd.grad(y, wanted, error.to(y.dtype))
    pairs += zip((wide_e @ wide_w, wide_e.t() @ wide_x), gradients, strict=False)
    return tuple(_db(reference, found.float()) for reference, found in pairs)


def _db(reference: torch.Tensor, found: torch.Tensor) -> float:
    noise = (reference - found).square().sum().double()
    return float(10 * torch.log10(reference.square().sum().double() / noise)) if noise > 0 else float("inf")


def _normal(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = linear.weight
    return (
        torch.randn(256, linear.in_features, generator=generator).to(weight.device, weight.dtype),
        torch.randn(256, linear.out_features, generator=generator).to(weight.device, weight.dtype),
    )


def _record(model: nn.Module, linears: dict, calibration: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
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
        for p in model.parameters():
            p.grad = None
            p.requires_grad_(p.is_floating_point())
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
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}|torch {torch.__version__}|triton {triton.__version__}"


def _time(layer: nn.Linear, tokens: int, frozen: bool) -> float:
    """ms of forward and backward of a layer."""
    weight = layer.weight
    x = torch.randn(tokens, layer.in_features, device=weight.device).to(weight.dtype).requires_grad_()
    error = torch.randn(tokens, layer.out_features, device=weight.device).to(weight.dtype)
    wanted = [x] if frozen else [x, layer.weight]

    def step() -> None:
        torch.autograd.grad(layer(x), wanted, error)

    return milliseconds(step, device=weight.device)
