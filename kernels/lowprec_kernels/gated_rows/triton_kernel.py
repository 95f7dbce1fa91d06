"""The gated product, or its two gradients, and the cast by rows in one pass. Definitions: reference.py.

What has to move, over the 3.0 TB/s of a copy on an H100, for 8192 x 8192: forward 2 x 134 MB read and 67 MB written,
0.11 ms; backward 3 x 134 MB read and 2 x 67 MB written, 0.18 ms. Liger's kernels and the casts after them move 604 MB
and 1073 MB.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.libdevice import tanh

from lowprec_kernels.gated_rows import reference
from lowprec_kernels.hadamard.triton_kernel import INTERPRETED
from lowprec_kernels.quantize_rows.reference import FP8, LARGEST_CODE
from lowprec_kernels.quantize_rows.triton_kernel import store_rows

LARGEST = LARGEST_CODE[FP8]
ROOT = tl.constexpr(reference.ROOT)
CUBIC = tl.constexpr(reference.CUBIC)
ELEMENTS_PER_THREAD = 32
"""Of a row; backward holds two fp32 results of each until the largest of both are known. As Triton 3.6 compiles SwiGLU
for an H100, a multiprocessor so has registers for three rows of 8192 in backward, and for one of 14336."""


@triton.jit
def _tanh(g, INTERPRETED: tl.constexpr):
    x = ROOT * (g + CUBIC * (g * g * g))
    # The interpreter has no libdevice, whose function Liger calls.
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0 if INTERPRETED else tanh(x)


@triton.jit
def _rounded_to(x, pointer):
    """fp32, rounded to what lies at the pointer. Products of two such numbers are exact in fp32 before."""
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _load_row(pointer, row, stride, column, DIM: tl.constexpr):
    """[1, columns] in fp32."""
    return tl.load(pointer + row[:, None] * stride + column[None, :], (column < DIM)[None, :], 0.0).to(tl.float32)


@triton.jit
def _quantize_gated(
    gate_ptr, up_ptr, q_ptr, s_ptr, rows, gate_stride, up_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, SWIGLU: tl.constexpr, LARGEST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    column = tl.arange(0, PADDED)
    g = _load_row(gate_ptr, row, gate_stride, column, DIM)
    u = _load_row(up_ptr, row, up_stride, column, DIM)
    activated = g * tl.sigmoid(g) if SWIGLU else 0.5 * g * (1 + _tanh(g, INTERPRETED))
    h = _rounded_to(_rounded_to(activated, gate_ptr) * u, gate_ptr)
    store_rows(h, q_ptr, s_ptr, None, row, column, rows, DIM, LARGEST, False, False)


@triton.jit
def _quantize_gated_gradients(
    error_ptr, gate_ptr, up_ptr, gate_q_ptr, gate_s_ptr, up_q_ptr, up_s_ptr, partner_ptr, rows, error_stride,
    gate_stride, up_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, SWIGLU: tl.constexpr, LARGEST: tl.constexpr, PARTNER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    column = tl.arange(0, PADDED)
    e = _load_row(error_ptr, row, error_stride, column, DIM)
    g = _load_row(gate_ptr, row, gate_stride, column, DIM)
    u = _load_row(up_ptr, row, up_stride, column, DIM)
    # As Liger writes it, sum by sum: the compiler joins the same multiplications and additions.
    if SWIGLU:
        sigmoid = tl.sigmoid(g)
        activated = g * sigmoid
        gate_error = e * (activated * (1 - sigmoid) + sigmoid) * u
    else:
        t = _tanh(g, INTERPRETED)
        activated = _rounded_to(0.5 * g * (1 + t), gate_ptr)
        slope = 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * (ROOT * (1 + 3 * CUBIC * g * g))
        gate_error = _rounded_to(e * u, gate_ptr) * slope
    gate_error, up_error = _rounded_to(gate_error, gate_ptr), _rounded_to(e * activated, gate_ptr)
    store_rows(gate_error, gate_q_ptr, gate_s_ptr, partner_ptr, row, column, rows, DIM, LARGEST, PARTNER, PARTNER)
    store_rows(up_error, up_q_ptr, up_s_ptr, partner_ptr, row, column, rows, DIM, LARGEST, PARTNER, PARTNER)


def quantize_gated(
    gate: torch.Tensor, up: torch.Tensor, kind: str, *, warps: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.quantize_gated``; rows contiguous, in bf16, fp16 or fp32."""
    rows, dim = gate.shape
    codes, scale = _results(gate)
    if rows:
        padded = triton.next_power_of_2(dim)
        _quantize_gated[(rows,)](
            gate, up, codes, scale, rows, gate.stride(0), up.stride(0), dim, padded, kind == "SwiGLU", LARGEST,
            INTERPRETED, num_warps=warps or _warps(padded),
        )  # fmt: skip
    return codes, scale


def quantize_gated_gradients(
    error: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: str,
    partner: torch.Tensor | None = None,
    *,
    warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``reference.quantize_gated_gradients``; rows contiguous, in bf16, fp16 or fp32."""
    rows, dim = gate.shape
    results = (*_results(gate), *_results(gate))
    if rows:
        padded = triton.next_power_of_2(dim)
        _quantize_gated_gradients[(rows,)](
            error, gate, up, *results, partner, rows, error.stride(0), gate.stride(0), up.stride(0), dim, padded,
            kind == "SwiGLU", LARGEST, partner is not None, INTERPRETED, num_warps=warps or _warps(padded),
        )  # fmt: skip
    return results


def _results(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(gate.shape, dtype=FP8, device=gate.device)
    return codes, torch.empty(gate.shape[0], dtype=torch.float32, device=gate.device)


def _warps(padded: int) -> int:
    return min(32, max(4, padded // (32 * ELEMENTS_PER_THREAD)))
