"""``lowprec::quantize_gated`` and ``lowprec::quantize_gated_gradients``: the product of a gated MLP, and its gradients,
cast to e4m3 by rows in the pass that computes them."""

import torch
from lowprec_kernels.gated_rows import reference

from lowprec.ops.backends import FP8, Backend, choose, define, lazily, no_triton
from lowprec.ops.quantize_rows import LARGEST_DIM


def _no_triton(gate: torch.Tensor, *others: torch.Tensor) -> str | None:
    if gate.shape[-1] > LARGEST_DIM:
        return f"a row of {gate.shape[-1]} is longer than {LARGEST_DIM}"
    if gate.dtype == torch.float64:
        return "fp64 runs in the reference"
    if any(tensor.stride(-1) != 1 for tensor in (gate, *others)):
        return "rows are not contiguous"
    return no_triton(gate.device, FP8)


BACKENDS = (
    Backend(
        "triton",
        lazily("gated_rows.triton_kernel", "quantize_gated"),
        lambda gate, up, kind: _no_triton(gate, up),
    ),
    Backend("reference", reference.quantize_gated),
)
GRADIENT_BACKENDS = (
    Backend(
        "triton",
        lazily("gated_rows.triton_kernel", "quantize_gated_gradients"),
        lambda error, gate, up, kind, partner: _no_triton(gate, up, error),
    ),
    Backend("reference", reference.quantize_gated_gradients),
)


def _run(gate, up, kind):
    return choose(BACKENDS, gate, up, kind).run(gate, up, kind)


def _fake(gate, up, kind):
    scales = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return gate.new_empty(gate.shape, dtype=FP8), gate.new_empty(gate.shape[0], dtype=scales)


def _run_gradients(error, gate, up, kind, partner=None):
    arguments = (error, gate, up, kind, partner)
    return choose(GRADIENT_BACKENDS, *arguments).run(*arguments)


def _fake_gradients(error, gate, up, kind, partner=None):
    return (*_fake(gate, up, kind), *_fake(gate, up, kind))


quantize_gated = define("quantize_gated(Tensor gate, Tensor up, str kind) -> (Tensor, Tensor)", _run, _fake)
"""``quantize_gated(gate, up, kind)``: e4m3 codes ``[rows, dim]`` and fp32 scales ``[rows]`` of a(``gate``) * ``up``,
both ``[rows, dim]``; ``kind`` is ``SwiGLU`` or ``GeGLU``; see the reference."""

quantize_gated_gradients = define(
    "quantize_gated_gradients(Tensor error, Tensor gate, Tensor up, str kind, Tensor? partner=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_gradients,
    _fake_gradients,
)
"""``quantize_gated_gradients(error, gate, up, kind, partner=None)``: codes and scales of the gate's gradient, then of
up's; see the reference."""
