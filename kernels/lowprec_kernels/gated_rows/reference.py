"""The product in the middle of a gated MLP, and its gradients, cast by rows to e4m3: the definitions.

    H = a(G) * U        dG = dH * a'(G) * U        dU = dH * a(G)
    SwiGLU: a(g) = g sigmoid(g)        GeGLU: a(g) = g / 2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))

All are [rows, dim]. Each of H, dG, dU is rounded to the dtype of G before it is cast, and what leads to it is rounded
where Liger's kernels round (liger-kernel 0.8.5, ops/swiglu.py, ops/geglu.py): the codes are those of Liger's results.
"""

import torch

from lowprec_kernels.quantize_rows.reference import FP8, quantize_rows

KINDS = ("SwiGLU", "GeGLU")
ROOT = 0.7978845608028654  # sqrt(2 / pi)
CUBIC = 0.044715


def product(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """H in the dtype of ``gate`` and ``up``."""
    g = _wide(gate)
    activated = g * g.sigmoid() if kind == "SwiGLU" else 0.5 * g * (1 + _tanh(g))
    return activated.to(gate.dtype) * up


def gradients(
    error: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """dG and dU for ``error`` = dH, all in the dtype of ``gate``."""
    g, dtype = _wide(gate), gate.dtype
    if kind == "SwiGLU":
        sigmoid = g.sigmoid()
        activated = g * sigmoid
        slope = activated * (1 - sigmoid) + sigmoid
        return (error * slope * up).to(dtype), (error * activated).to(dtype)
    tanh = _tanh(g)
    activated = 0.5 * g * (1 + tanh)
    slope = 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh * tanh) * (ROOT * (1 + 3 * CUBIC * g * g))
    return ((error * up) * slope).to(dtype), error * activated.to(dtype)


def quantize_gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[rows, dim]`` and scales ``[rows]`` of H; ``kind`` is one of ``KINDS``."""
    return quantize_rows(product(gate, up, kind), 1, FP8)


def quantize_gated_gradients(
    error: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str, partner: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[rows, dim]`` and scales ``[rows]`` of dG, then those of dU. With ``partner [rows]`` the scales' products
    with it are powers of two, as in ``quantize_rows``."""
    gate_error, up_error = gradients(error, gate, up, kind)
    pairs = partner is not None
    return (
        *quantize_rows(gate_error, 1, FP8, pairs, partner),
        *quantize_rows(up_error, 1, FP8, pairs, partner),
    )


def _tanh(g: torch.Tensor) -> torch.Tensor:
    return torch.tanh(ROOT * (g + CUBIC * (g * g * g)))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
