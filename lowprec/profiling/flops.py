"""Floating-point operations of a step, counted operator by operator, and the share of the hardware's peak they reach.

Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): the time that the products of a step
would take at the peak, over the time that it took. Each product is held against the peak of its own kind, so 8-bit
products are not flattered by the 16-bit peak. What backward recomputes of forward is work that the model does not need:
it counts in ``hfu`` alone. Attention is counted in full, as there, though a causal one needs half of it.
"""

import sys
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowprec.ops  # noqa: F401  # its operators are to be known
from lowprec.machine import NAMED_CARDS, card_of, this_machine
from lowprec.plan.operators import ATTENTION, KIND_OF, know_bitsandbytes, know_lowprec, products_of
from lowprec.profiling.modules import ModuleStack, in_backward

_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}
"""Operator -> place of the query among its arguments, passes over the scores."""


class Flops(TorchDispatchMode):
    """Counts while it is entered. ``counts[pass, kind]``: pass is forward, backward or recomputed; kind as in
    ``lowprec.machine`` (bf16, fp8, ...)."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._modules = ModuleStack(model)
        self._recomputes = False
        self._hooks: list[Any] = []

    def __enter__(self) -> "Flops":
        know_lowprec()
        if "bitsandbytes" in sys.modules:
            know_bitsandbytes()
        self._hooks = self._modules.attach(self._turn)
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        where = "recomputed" if self._recomputes else "backward" if in_backward() else "forward"
        if func.overloadpacket in _CPU_ATTENTION:
            place, passes = _CPU_ATTENTION[func.overloadpacket]
            query, key = args[place], args[place + 1]
            rows, heads, length, width = query.shape
            self.counts[where, KIND_OF[query.dtype]] += 2 * rows * heads * length * key.shape[2] * width * passes
        outputs = list(result) if isinstance(result, tuple) else [result]
        for product in products_of(func, args, outputs):
            kind = product.kind if product.kind != ATTENTION else KIND_OF[args[0].dtype]
            self.counts[where, kind] += 2 * product.m * product.n * product.k * product.count
        return result

    def _turn(self, recomputes: bool) -> None:
        self._recomputes = recomputes


def utilisation(counts: Counter[tuple[str, str]], step_s: float, device: torch.device) -> dict[str, Any]:
    """The figures of ``profile.json``: FLOPs a step by kind, the peaks that were assumed and their source, ``mfu``.

    Args:
        counts: of ``Flops``, over one step.
        step_s: the median step.
    """
    needed: Counter[str] = Counter()
    recomputed: Counter[str] = Counter()
    for (where, kind), flops in counts.items():
        (recomputed if where == "recomputed" else needed)[kind] += flops
    peaks, source = peak_tflops(device)
    figures: dict[str, Any] = {
        "tflop_per_step": {kind: flops / 1e12 for kind, flops in needed.items()},
        "recomputed_tflop_per_step": sum(recomputed.values()) / 1e12,
        "tflop_per_second": sum(needed.values()) / 1e12 / step_s,
        "peak_tflops": {kind: peaks[kind] for kind in (*needed, *recomputed) if kind in peaks},
        "peak_source": source,
        "mfu": None,
        "hfu": None,
    }
    if needed and all(kind in peaks for kind in (*needed, *recomputed)):
        ideal = {kind: flops / peaks[kind] / 1e12 for kind, flops in needed.items()}
        again = sum(flops / peaks[kind] / 1e12 for kind, flops in recomputed.items())
        figures |= {
            "mfu": sum(ideal.values()) / step_s,
            "hfu": (sum(ideal.values()) + again) / step_s,
            "mfu_by_kind": {kind: seconds / step_s for kind, seconds in ideal.items()},
        }
    return figures


def peak_tflops(device: torch.device) -> tuple[dict[str, float], str]:
    """TFLOP/s by kind of product, and where they are from."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = card_of(properties.name, properties.multi_processor_count)
        if name is not None:
            return NAMED_CARDS[name].peaks(), f"datasheet of {name}, dense, sums in fp32"
    machine = this_machine()
    if machine is not None:
        return dict(
            machine.tflops
        ), f"the most that large products reached on {machine.name} (lowprec doctor --measure)"
    return {}, "no peak is known of this machine: lowprec doctor --measure finds what large products reach"
