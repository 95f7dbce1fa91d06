"""How fast a step could be: its products at the rates measured in this run, its attention as measured, and the bytes
that have to move at the copy bandwidth, one after the other. What a run needs beyond that is launches, gaps, and passes
over memory that could be saved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from lowprec import ops
from lowprec.bench.train.works import Work
from lowprec.machine.timing import copy_bandwidth, milliseconds
from lowprec.ops.backends import FP8

NF4_BYTES = 0.5 + 1 / 64 + 4 / 64 / 256


@dataclass(frozen=True)
class Layer:
    """The matrices of one decoder layer, ``(out, in)``, and the inputs that are quantised, by their widths."""

    linears: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int

    @classmethod
    def of(cls, shape: dict[str, Any]) -> "Layer":
        hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
        dim = shape.get("head_dim") or hidden // heads
        q, kv = heads * dim, shape["num_key_value_heads"] * dim
        linears = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden))
        return cls(
            (*linears, (hidden, inner)),
            (hidden, q, hidden, inner),
            hidden,
            heads,
            shape["num_key_value_heads"],
            dim,
            inner,
        )

    @property
    def weights(self) -> int:
        return sum(out * into for out, into in self.linears)

    @property
    def down(self) -> int:
        """Weights of the last matrix."""
        return self.hidden * self.inner

    def elementwise_bytes(self) -> float:
        """A token's forward pass through one layer: norms, residuals, rotary embedding, gate, casts to 8 bits; 16-bit
        values read and written once by each."""
        norms, residuals = 2 * 4 * self.hidden, 2 * 6 * self.hidden
        rotary = 4 * self.head_dim * (self.heads + self.kv_heads)
        gate = 6 * self.inner
        return norms + residuals + rotary + gate + 3 * sum(self.inputs)


def limit(work: Work, clock: Callable[..., float] = milliseconds, bandwidth_gb_per_s: float | None = None) -> dict:
    """ms of a step by part, and the tokens/s that they allow.

    Args:
        clock: ms of a call.
        bandwidth_gb_per_s: read and written bytes together; measured where None.
    """
    layer, count, tokens = Layer.of(work.shape), work.shape["num_hidden_layers"], work.tokens
    frozen = work.method != "full"
    checkpointed = frozen or "train.gradient_checkpointing=full" in work.overrides
    forwards = 2 if checkpointed else 1
    bandwidth = bandwidth_gb_per_s or copy_bandwidth(2**30)
    rates: dict[tuple[int, int, int], tuple[float, str]] = {}
    ms = {"products": 0.0, "attention": 0.0, "head": 0.0, "elementwise": 0.0, "adapter": 0.0, "decode": 0.0}
    for index, (out, into) in enumerate(layer.linears):
        # What comes out of the last one is of no use to backward, so it need not be computed again.
        again = 1 if index == len(layer.linears) - 1 else forwards
        passes = [((tokens, out, into), again), ((tokens, into, out), 1)] + (
            [] if frozen else [((out, into, tokens), 1)]
        )
        for product, times in passes:
            if product not in rates:
                rates[product] = fastest_product(*product, clock)
            ms["products"] += rates[product][0] * times * count
    vocab = work.shape["vocab_size"]
    head = [(tokens, vocab, layer.hidden), (tokens, layer.hidden, vocab)]
    ms["head"] = sum(
        _bf16(*product, clock) for product in [*head, *([] if frozen else [(vocab, layer.hidden, tokens)])]
    )
    ms["attention"] = _attention(work, layer, forwards, clock) * count
    per_token = layer.elementwise_bytes() * (forwards + 2) * count
    ms["elementwise"] = per_token * tokens / bandwidth / 1e6
    if work.method == "nf4":
        decoded = layer.weights * (forwards + 1) - layer.down * (forwards - 1)
        ms["decode"] = decoded * count * (NF4_BYTES + 1) / bandwidth / 1e6
    if frozen:  # X read for A and for dA, Y and E_X updated in place, E read for P and dB
        width = sum((forwards + 1) * 2 * into for into in layer.inputs)
        width += sum(4 * forwards * out + 4 * out + 4 * into for out, into in layer.linears)
        width -= 4 * (forwards - 1) * layer.hidden  # the last Y is not made again
        ms["adapter"] = width * tokens * count / bandwidth / 1e6
    else:  # gradients and 16-bit weights read, weights written, int8 states with split masters read and written
        parameters = layer.weights * count + vocab * layer.hidden
        ms["adapter"] = parameters * (2 + 4 + 8) / bandwidth / 1e6
    total = sum(ms.values())
    kinds = sorted({f"{m}x{n}x{k}: {kind}, {2 * m * n * k / took / 1e9:.0f} TFLOP/s"
                    for (m, n, k), (took, kind) in rates.items()})  # fmt: skip
    ms["optimizer" if not frozen else "adapter"] = ms.pop("adapter")
    return {
        "step_ms": {name: round(value, 3) for name, value in ms.items() if value},
        "step_ms_p50": round(total, 3),
        "tokens_per_second": round(tokens / total * 1e3, 1),
        "copy_gb_per_s": round(bandwidth, 1),
        "rates": kinds,
    }


def fastest_product(m: int, n: int, k: int, clock: Callable[..., float]) -> tuple[float, str]:
    """ms and kind of the fastest product ``[m, k] x [k, n]`` of operands that are there already."""
    a, b = (torch.randn(size, k, device="cuda", dtype=torch.bfloat16) for size in (m, n))
    best = (clock(lambda: a @ b.t()), "bf16")
    capability = torch.cuda.get_device_capability()
    for dtype, kind in ((torch.int8, "int8"), (FP8, "fp8")):
        if k % 16 or n % 16 or capability < ((8, 9) if dtype == FP8 else (8, 0)):
            continue
        operands = (*ops.quantize_rows(a, 1, dtype), *ops.quantize_rows(b, 1, dtype), None, torch.bfloat16, True)
        best = min(best, (clock(lambda operands=operands: ops.scaled_matmul(*operands)), kind))
    return best


def _bf16(m: int, n: int, k: int, clock: Callable[..., float]) -> float:
    """ms, of parts small enough to be held: the head's logits never are as a whole."""
    parts = max(1, m * n // 2**28)
    a, b = (torch.randn(size, k, device="cuda", dtype=torch.bfloat16) for size in (-(-m // parts), n))
    return clock(lambda: a @ b.t()) * parts


def _attention(work: Work, layer: Layer, forwards: int, clock: Callable[..., float]) -> float:
    """ms of one layer's causal attention, forward (again where it is recomputed) and backward."""

    def heads(count: int) -> torch.Tensor:
        shape = (work.batch, count, work.length, layer.head_dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    q, k, v = heads(layer.heads), heads(layer.kv_heads), heads(layer.kv_heads)

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        forward = clock(attend)
    error = torch.randn_like(attend())
    both = clock(lambda: torch.autograd.grad(attend(), (q, k, v), error))
    return both + (forwards - 1) * forward
