"""``auto``: for each distinct layer shape the fastest scheme whose noise is within a bound, by measurement on this
machine.

Times: forward and backward of one layer at ``tokens`` tokens, on the device that the weights are on. Noise: the output
and both gradients of a calibration batch (inputs and errors of every layer, from one pass of the model), pooled, in dB
against fp32 products. Without a calibration batch the inputs are normal numbers, which flatter every scheme; the report
says so.
A rotated e4m3 scheme that is noisier than the plain one is not taken, however fast. Verdicts on time are kept in a file
keyed by GPU, versions and shape. Where the machine was measured (``lowprec doctor --measure``), a scheme whose products
alone would take longer than those in 16 bits is not timed.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lowprec.errors import UserError
from lowprec.layers.eight_bit_schemes import EightBit, Fp8, Fp8Hadamard, Int8Hadamard
from lowprec.layers.measured import layer_noise_db, milliseconds_of, normal_sample, record, remembered_times
from lowprec.machine import Machine, this_machine
from lowprec.ops.backends import FP8
from lowprec.option import option

CANDIDATES: tuple[type[EightBit], ...] = (Fp8, Fp8Hadamard, Int8Hadamard)
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MARGIN = 1.1
"""Predicted products must be slower by more than the predictor's error before their scheme is given up."""


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
    chooses: ClassVar[bool] = True
    """``wrap`` asks ``choose``."""

    def choose(
        self,
        model: nn.Module,
        linears: dict[str, tuple[nn.Linear, bool]],
        calibration: Any,
        device: torch.device | str | None = None,
        in_graphs: bool = False,
    ) -> dict[str, tuple[EightBit | None, str]]:
        """Layer name -> the scheme (None: 16 bits) and the reason, with what was measured on ``device`` (None: where
        the layer is), as kernels of a CUDA graph or launched one by one."""
        samples = record(model, linears, calibration) if calibration is not None else {}
        times: dict[tuple, dict[str, float]] = {}
        verdicts = {}
        for name, (linear, frozen) in linears.items():
            placed = copy.deepcopy(linear).to(device)
            if placed.weight.is_floating_point():
                placed.requires_grad_(not frozen)
            key = (linear.out_features, linear.in_features, frozen, linear.weight.dtype)
            if key not in times:
                times[key] = self._times(placed, frozen, in_graphs)
            verdicts[name] = self._verdict(placed, frozen, times[key], samples.get(name))
        return verdicts

    def _schemes(self, linear: nn.Linear, frozen: bool) -> list[EightBit]:
        schemes = [scheme(cache=self.cache, layout=self.layout) for scheme in CANDIDATES]
        return [scheme for scheme in schemes if scheme.why_not(linear, frozen) is None]

    def _worth_timing(self, linear: nn.Linear, frozen: bool) -> tuple[list[EightBit], list[tuple[EightBit, float]]]:
        """The schemes that may be faster, and those that cannot be, with their products' time over that in 16 bits:
        casts and rotations only add to it."""
        schemes, machine = self._schemes(linear, frozen), profile_of(linear.weight.device)
        out, into, kind = linear.out_features, linear.in_features, KINDS.get(linear.weight.dtype, "fp32")
        shapes = [(self.tokens, out, into), (self.tokens, into, out), *([] if frozen else [(out, into, self.tokens)])]
        worth, hopeless = [], []
        for scheme in schemes:
            eight = "fp8" if scheme.dtype == FP8 else "int8"
            ratio = 0.0
            if machine is not None and {kind, eight} <= machine.tflops.keys():
                ratio = sum(machine.product_ms(eight, *s) for s in shapes)
                ratio /= sum(machine.product_ms(kind, *s) for s in shapes)
            if ratio > MARGIN:
                hopeless.append((scheme, ratio))
            else:
                worth.append(scheme)
        return worth, hopeless

    def _verdict(self, linear, frozen, times, sample) -> tuple[EightBit | None, str]:
        plain = times["bf16"]
        candidates, hopeless = self._worth_timing(linear, frozen)
        if not candidates and not hopeless:
            return None, Fp8().why_not(linear, frozen) or ""
        schemes = sorted(candidates, key=lambda scheme: times[scheme.option_name])
        notes = [
            f"{scheme.option_name}'s products alone take {ratio:.1f}x those in 16 bits by this machine's profile"
            for scheme, ratio in hopeless
        ]

        def noise_db(scheme: EightBit) -> float:
            layer = scheme.convert(copy.deepcopy(linear), frozen)
            x, error = sample or normal_sample(linear)
            return min(layer_noise_db(layer, linear.weight, x, error, not frozen))

        for scheme in schemes:
            took = times[scheme.option_name]
            if took >= plain:
                notes.append(f"{scheme.option_name} {plain / took:.2f}x")
                continue
            worst = noise_db(scheme)
            if worst < self.min_sqnr_db:
                notes.append(f"{scheme.option_name} {worst:.0f} dB is under {self.min_sqnr_db:.0f}")
                continue
            if isinstance(scheme, Fp8Hadamard) and worst < (plain_fp8 := noise_db(Fp8())):
                notes.append(f"fp8_hadamard's {worst:.1f} dB are fewer than the {plain_fp8:.1f} of fp8")
                continue
            measured = "" if sample else " on normal numbers (no calibration batch)"
            return scheme, f"{plain / took:.2f}x bf16 at {self.tokens} tokens, {worst:.0f} dB{measured}"
        return None, f"16 bits are best at {self.tokens} tokens: {', '.join(notes)}"

    def _times(self, linear: nn.Linear, frozen: bool, in_graphs: bool) -> dict[str, float]:
        """Scheme -> ms of forward and backward, from the file of verdicts where it knows them."""
        shape = f"{linear.out_features}|{linear.in_features}|{linear.weight.dtype}"

        candidates, _ = self._worth_timing(linear, frozen)

        def measure() -> dict[str, float]:
            ms = {"bf16": milliseconds_of(linear, self.tokens, frozen, in_graphs)}
            for scheme in candidates:
                layer = scheme.convert(copy.deepcopy(linear), frozen)
                ms[scheme.option_name] = milliseconds_of(layer, self.tokens, frozen, in_graphs)
            return ms

        names = ",".join(scheme.option_name for scheme in candidates)
        key = f"{shape}|{frozen}|{self.tokens}|{self.layout}|{self.cache}|{names}|{in_graphs}"
        return remembered_times(linear.weight.device, key, measure)


def profile_of(device: torch.device) -> Machine | None:
    """The measured profile, where it is that of the GPU ``device``."""
    if device.type != "cuda":
        return None
    machine = this_machine()
    return machine if machine is not None and machine.name == torch.cuda.get_device_name(device) else None
