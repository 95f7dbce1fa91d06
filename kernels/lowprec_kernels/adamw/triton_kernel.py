"""One pass over weights, gradients and states: decode, AdamW, encode (the formats are reference.py's).

A program of one warp, or of two where fields of four bytes take part, takes one block of 256 elements; one warp finds
the scale of its block without shared memory. As sm_90 code by Triton 3.6 a thread with 8-bit moments runs 82
instructions an element, with a rounded weight or a split master; it was 208 and 194 with codes converted and divided,
three or four hashes an element, and loads of one element each. On an H100 (copy: 3.0 TB/s) 268 M bf16 weights take 0.94
ms rounded (2.9 TB/s) and 1.26 ms with a split master (3.0 TB/s, 1.81 ms before), and with fp32 moments, whose rounded
roots and quotients are torch.optim.AdamW's, 2.34 ms (3.0 TB/s). Programs of eight blocks took 0.95, 1.32 and 2.42.

An element's result must not depend on the slice it is updated in, nor on how wide the compiler may read there: sums of
two products are written as one product and one fused multiply and add.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.adamw.reference import BLOCK, SCALE_OF
from lowprec_kernels.adamw.triton_formats import (
    as_bits,
    as_float,
    decode_m,
    decode_v,
    encode_m,
    encode_v,
    hash32,
    mix32,
    round_to_bf16,
)

PLAIN, ROUNDED, SPLIT, WHOLE = range(4)  # where fp32 weights come from: the weight, a rounded one, residual, master

ALIGNED = 16
"""Bytes, and elements, that the slices of a table begin and end at."""
LARGEST_IN_TABLE = 1 << 22
"""Elements. The device works longer on a larger slice than the host launches its kernel."""
BLOCKS = 8
"""That a program of the table's kernel takes, so that it reads its row for more than one. On an H100 the 134.5 M
elements of 272 parameters take 1.18, 1.19, 1.20 and 1.21 ms with 4, 8, 16 and 32 (fp32 moments, split master), and
0.656, 0.654, 0.660 and 0.687 with 8-bit moments."""
COUNT = 12
"""Column of the table with a slice's elements. Before it stand the addresses that ``_adamw_kernel`` takes, in its
order: weight, gradient, master, moments and scales 0 to 8, step and corrections 9 to 11; after it, start and key."""
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def why_not(param: Tensor) -> str | None:
    """Why the kernel cannot update ``param``, or None."""
    return None if param.is_cuda else f"the parameter is on {param.device}, not on a CUDA device"


@triton.jit
def _update_block(
    param_ptr, grad_ptr, master_ptr, m_ptr, v_ptr, v_max_ptr, m_scale_ptr, v_scale_ptr, v_max_scale_ptr,
    block, count, start, stream, rate, correction2,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay,
    WEIGHT: tl.constexpr, MOMENTS: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_SIZE)
    first = block * BLOCK_SIZE
    offsets = first + column
    mask = offsets < count

    weight = tl.load(param_ptr + offsets, mask=mask, other=0)
    if WEIGHT == 2:
        residual = tl.load(master_ptr + offsets, mask=mask, other=0)
        high = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
        p = as_float(high + residual.to(tl.int32))
    elif WEIGHT == 3:
        p = tl.load(master_ptr + offsets, mask=mask, other=0)
    else:
        p = weight.to(tl.float32)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    m = tl.load(m_ptr + offsets, mask=mask, other=0)
    v = tl.load(v_ptr + offsets, mask=mask, other=0)
    if AMSGRAD:
        v_max = tl.load(v_max_ptr + offsets, mask=mask, other=0)
    if MOMENTS == 2:
        m = decode_m(m, beta1 * tl.load(m_scale_ptr + block))
        v = decode_v(v, beta2 * tl.load(v_scale_ptr + block))
        if AMSGRAD:
            v_max = decode_v(v_max, tl.load(v_max_scale_ptr + block))
    else:
        m = beta1 * m.to(tl.float32)
        v = beta2 * v.to(tl.float32)

    p = p * decay
    m = tl.fma(one_minus_beta1 + tl.zeros_like(g), g, m)
    v = tl.fma(one_minus_beta2 * g, g, v)
    v_used = v
    if AMSGRAD:
        v_max = tl.maximum(v_max.to(tl.float32), v)
        v_used = v_max
    if MOMENTS == 2:
        # Of the square's root a reciprocal: one instruction, where a division takes eight.
        denominator = tl.sqrt(v_used) * (1 / correction2) + eps
        p = tl.fma(-rate * m, tl.rsqrt(denominator * denominator), p)
    else:
        denominator = tl.div_rn(tl.sqrt_rn(v_used), correction2 + tl.zeros_like(v)) + eps
        p = tl.fma(-rate + tl.zeros_like(m), tl.div_rn(m, denominator), p)

    random = mix32(hash32((start + first).to(tl.uint32) ^ stream) + column.to(tl.uint32))
    if MOMENTS == 2:
        smallest = 1.1754943508222875e-38
        m_scale, v_scale = tl.max(tl.abs(m), axis=0), tl.max(v, axis=0)
        tl.store(m_scale_ptr + block, m_scale)
        tl.store(v_scale_ptr + block, v_scale)
        m_code = encode_m(m, random, tl.maximum(m_scale, smallest))
        v_code = encode_v(v, tl.sqrt(v), random, tl.maximum(v_scale, smallest))
        tl.store(m_ptr + offsets, m_code, mask=mask)
        tl.store(v_ptr + offsets, v_code, mask=mask)
        if AMSGRAD:
            scale = tl.max(v_max, axis=0)
            tl.store(v_max_scale_ptr + block, scale)
            code = encode_v(v_max, tl.sqrt(v_max), random, tl.maximum(scale, smallest))
            tl.store(v_max_ptr + offsets, code, mask=mask)
    elif MOMENTS == 1:
        tl.store(m_ptr + offsets, round_to_bf16(m, random & 0xFFFF), mask=mask)
        tl.store(v_ptr + offsets, round_to_bf16(v, random >> 16), mask=mask)
        if AMSGRAD:
            tl.store(v_max_ptr + offsets, round_to_bf16(v_max, random >> 16), mask=mask)
    else:
        tl.store(m_ptr + offsets, m, mask=mask)
        tl.store(v_ptr + offsets, v, mask=mask)
        if AMSGRAD:
            tl.store(v_max_ptr + offsets, v_max, mask=mask)

    if WEIGHT == 2:
        bits = as_bits(p)
        high = (tl.where(p == p, bits + 0x8000, bits) >> 16).to(tl.uint16)
        tl.store(param_ptr + offsets, high.to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(master_ptr + offsets, (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    elif WEIGHT == 3:
        tl.store(master_ptr + offsets, p, mask=mask)
        tl.store(param_ptr + offsets, p.to(param_ptr.dtype.element_ty), mask=mask)
    elif WEIGHT == 1:
        tl.store(param_ptr + offsets, round_to_bf16(p, (random * 0x9E3779B9) >> 16), mask=mask)
    else:
        tl.store(param_ptr + offsets, p, mask=mask)


@triton.jit
def _stream(step_ptr, key):
    """Where the random bits of a parameter's step begin."""
    return hash32(tl.load(step_ptr).to(tl.int32).to(tl.uint32) + key.to(tl.uint32))


# Scalars of one parameter are entries of vectors: compiled once, wherever such an entry lies; and twice for counts that
# are multiples of 16, as most are, and others, which are read element by element.
_SCALARS = ["step_ptr", "correction1_ptr", "correction2_ptr", "found_inf_ptr", "lr"]


@triton.jit(do_not_specialize=["start", "key"], do_not_specialize_on_alignment=_SCALARS)
def _adamw_kernel(
    param_ptr, grad_ptr, master_ptr, m_ptr, v_ptr, v_max_ptr, m_scale_ptr, v_scale_ptr, v_max_scale_ptr,
    step_ptr, correction1_ptr, correction2_ptr, found_inf_ptr, lr,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, count, start, key,
    WEIGHT: tl.constexpr, MOMENTS: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None and tl.load(found_inf_ptr) != 0:
        return
    if LR_IS_TENSOR:
        lr = tl.load(lr).to(tl.float32)
        decay = 1 - lr * decay  # the weight decay alone was given: the host does not know the rate
    _update_block(
        param_ptr, grad_ptr, master_ptr, m_ptr, v_ptr, v_max_ptr, m_scale_ptr, v_scale_ptr, v_max_scale_ptr,
        tl.program_id(0).to(tl.int64), count, start, _stream(step_ptr, key),
        lr / tl.load(correction1_ptr), tl.load(correction2_ptr),
        beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay,
        WEIGHT, MOMENTS, AMSGRAD, MAXIMIZE, BLOCK_SIZE,
    )  # fmt: skip


@triton.jit
def _pointer(row, column, TYPE: tl.constexpr):
    """A tensor's address from its column of the table; such addresses are multiples of 16 (``table_row``)."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(TYPE)), 16)


@triton.jit(do_not_specialize_on_alignment=["found_inf_ptr", "lr"])
def _adamw_table_kernel(
    table_ptr, found_inf_ptr, lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay,
    WEIGHT: tl.constexpr, MOMENTS: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr, V_TYPE: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program (i, j) updates ``BLOCKS`` blocks of the slice in row j of the table, from block i * BLOCKS on."""
    if found_inf_ptr is not None and tl.load(found_inf_ptr) != 0:
        return
    row = table_ptr + tl.program_id(1).to(tl.int64) * COLUMNS
    count = tl.multiple_of(tl.load(row + 12), 16)
    begin = tl.program_id(0).to(tl.int64) * BLOCKS
    end = tl.minimum(begin + BLOCKS, tl.cdiv(count, BLOCK_SIZE))
    if begin >= end:
        return
    if LR_IS_TENSOR:
        lr = tl.load(lr).to(tl.float32)
        decay = 1 - lr * decay
    stream = _stream(tl.load(row + 9).to(tl.pointer_type(tl.float32)), tl.load(row + 14))
    rate = lr / tl.load(tl.load(row + 10).to(tl.pointer_type(tl.float32)))
    correction2 = tl.load(tl.load(row + 11).to(tl.pointer_type(tl.float32)))
    for block in range(begin, end):
        _update_block(
            _pointer(row, 0, WEIGHT_TYPE), _pointer(row, 1, GRAD_TYPE), _pointer(row, 2, MASTER_TYPE),
            _pointer(row, 3, M_TYPE), _pointer(row, 4, V_TYPE), _pointer(row, 5, V_TYPE),
            tl.load(row + 6).to(tl.pointer_type(tl.float32)), tl.load(row + 7).to(tl.pointer_type(tl.float32)),
            tl.load(row + 8).to(tl.pointer_type(tl.float32)),
            block, count, tl.load(row + 13), stream, rate, correction2,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay,
            WEIGHT, MOMENTS, AMSGRAD, MAXIMIZE, BLOCK_SIZE,
        )  # fmt: skip


def run(
    param: Tensor,
    grad: Tensor,
    states: dict[str, Tensor],
    *,
    step: Tensor,
    corrections: tuple[Tensor, Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    start: int,
    key: int,
    found_inf: Tensor | None,
) -> None:
    """Update a flat slice of a parameter and its states in place.

    Args:
        param, grad: [n], fp32, bf16 or fp16; ``states``: the fields of reference.py for the same elements.
        step: one element, counts from 1. ``corrections``: ``1 - b1^t`` and ``sqrt(1 - b2^t)``, one element each, fp32.
        start, key: the slice's first element in its parameter, a multiple of BLOCK, and the stream of its random bits.
        found_inf: one fp32 element; not zero: nothing changes.
    """
    assert start % BLOCK == 0
    constants = _constants(param, states, lr, maximize)
    count = param.numel()
    field = states.get  # a pointer that is None costs the host nothing: Triton asks CUDA about every other one
    _adamw_kernel[(triton.cdiv(count, BLOCK),)](
        param, grad, field("residual", field("master")), field("exp_avg"), field("exp_avg_sq"), field("max_exp_avg_sq"),
        field("exp_avg_scale"), field("exp_avg_sq_scale"), field("max_exp_avg_sq_scale"),
        step, *corrections, found_inf, lr,
        beta1, 1 - beta1, beta2, 1 - beta2, eps, _decay(lr, weight_decay), count, _signed(start), _signed(key),
        **constants,
    )  # fmt: skip


def table_row(
    param: Tensor, states: dict[str, Tensor], *, step: Tensor, corrections: tuple[Tensor, Tensor], start: int, key: int
) -> Tensor | None:
    """What ``run_table`` must know of a slice beside its gradient: addresses and numbers, int64, on the host.

    Valid as long as the tensors are where they are. Arguments as of ``run``. None where the slice is not for a table:
    it is large, so that a launch of its own costs nothing, or its memory cannot be read 16 bytes at a time.
    """
    assert start % BLOCK == 0
    elements = [param, None, states.get("residual", states.get("master"))]
    elements += [states.get(name) for name in SCALE_OF]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in elements]
    if param.numel() > LARGEST_IN_TABLE or param.numel() % ALIGNED or any(address % ALIGNED for address in addresses):
        return None
    scales = [states.get(name) for name in SCALE_OF.values()]
    addresses += [0 if tensor is None else tensor.data_ptr() for tensor in (*scales, step, *corrections)]
    return torch.tensor([*addresses, param.numel(), start, key])


def run_table(
    rows: Sequence[Tensor],
    grads: Sequence[Tensor],
    param: Tensor,
    states: dict[str, Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    found_inf: Tensor | None,
) -> None:
    """Update slices of one format in one launch, to the same bits as ``run`` does.

    Small models have hundreds of small parameters, each of which takes the host longer to launch than the device to
    update: a step over the 272 of a 135M model took 12 ms on an H100, and takes 1.7 so (docs/benchmarks).

    Args:
        rows: of ``table_row``. ``grads``: one for each, of one dtype, each address a multiple of ``ALIGNED``.
        param, states: of any of the slices, for their dtypes.
    """
    table = torch.stack(list(rows))
    table[:, 1] = torch.tensor([grad.data_ptr() for grad in grads])
    blocks = triton.cdiv(int(table[:, COUNT].max()), BLOCK)
    if param.is_cuda:
        table = table.pin_memory().to(param.device, non_blocking=True)
    master = states.get("residual", states.get("master", param))
    _adamw_table_kernel[(triton.cdiv(blocks, BLOCKS), len(rows))](
        table, found_inf, lr, beta1, 1 - beta1, beta2, 1 - beta2, eps, _decay(lr, weight_decay),
        WEIGHT_TYPE=_TYPES[param.dtype], GRAD_TYPE=_TYPES[grads[0].dtype], MASTER_TYPE=_TYPES[master.dtype],
        M_TYPE=_TYPES[states["exp_avg"].dtype], V_TYPE=_TYPES[states["exp_avg_sq"].dtype],
        COLUMNS=table.shape[1], BLOCKS=BLOCKS, **_constants(param, states, lr, maximize),
    )  # fmt: skip


def _constants(param: Tensor, states: dict[str, Tensor], lr: float | Tensor, maximize: bool) -> dict[str, Any]:
    """What the kernels are compiled for, by the formats of the arguments."""
    moments = 2 if SCALE_OF["exp_avg"] in states else int(states["exp_avg"].dtype == torch.bfloat16)
    if "residual" in states:
        weight = SPLIT
    elif "master" in states:
        weight = WHOLE
    else:
        weight = ROUNDED if param.dtype == torch.bfloat16 else PLAIN
    # A thread holds 16 bytes of the widest field, four or eight elements, for which all fields have one layout.
    num_warps = 2 if param.dtype == torch.float32 or "master" in states or moments == 0 else 1
    return {
        "WEIGHT": weight,
        "MOMENTS": moments,
        "AMSGRAD": "max_exp_avg_sq" in states,
        "MAXIMIZE": maximize,
        "LR_IS_TENSOR": isinstance(lr, Tensor),
        "BLOCK_SIZE": BLOCK,
        "num_warps": num_warps,
    }


def _decay(lr: float | Tensor, weight_decay: float) -> float:
    """The weight's factor; the weight decay alone where the device knows the rate. Rounded to fp32 once, as in
    torch.optim.AdamW: 1.4e-8 of 1 - 1e-5, which 100 steps make 1.4e-6 of the weight."""
    return weight_decay if isinstance(lr, Tensor) else 1 - lr * weight_decay


def _signed(x: int) -> int:
    """The int32 with the low 32 bits of ``x``, so that every slice finds the kernel compiled for int32."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x
