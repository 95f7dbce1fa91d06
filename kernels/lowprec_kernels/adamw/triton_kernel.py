"""One pass over weights, gradients and states: decode, AdamW, encode (the formats are reference.py's).

A program takes one block of 256 elements, whose scale it finds by one reduction. On an H100 (copy: 3.0 TB/s), 268 M
bf16 weights with a split master took 2.40 ms with fp32 moments (2.9 TB/s) and 1.81 ms with 8-bit ones (2.1 TB/s);
with four blocks a program and four warps 3.43 and 2.80 ms. Rounded division and roots in the 8-bit codes cost 4.1 ms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.adamw.reference import BLOCK, SCALE_OF

NUM_WARPS = 2
PLAIN, ROUNDED, SPLIT, WHOLE = range(4)  # where fp32 weights come from: the weight, a rounded one, residual, master


def why_not(param: Tensor) -> str | None:
    """Why the kernel cannot update ``param``, or None."""
    return None if param.is_cuda else f"the parameter is on {param.device}, not on a CUDA device"


@triton.jit
def _hash32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_to_bf16(x, random16):
    bits = x.to(tl.uint32, bitcast=True)
    rounded = bits + random16
    rounded = tl.where((rounded & 0x7F800000) == 0x7F800000, bits, rounded) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _power(t, SIGNED: tl.constexpr):
    return t * t if SIGNED else (t * t) * (t * t)


@triton.jit
def _load_moment(ptr, scale_ptr, offsets, mask, block, KIND: tl.constexpr, SIGNED: tl.constexpr):
    x = tl.load(ptr + offsets, mask=mask, other=0)
    if KIND == 2:
        scale = tl.load(scale_ptr + block)
        t = x.to(tl.float32) * (1 / 127.0 if SIGNED else 1 / 255.0)
        return _power(t, SIGNED) * tl.where(t < 0, -1.0, 1.0) * scale
    return x.to(tl.float32)


@triton.jit
def _store_moment(ptr, scale_ptr, x, random16, offsets, mask, block, KIND: tl.constexpr, SIGNED: tl.constexpr):
    if KIND == 2:
        levels = 127.0 if SIGNED else 255.0
        magnitude = tl.where(mask, tl.abs(x), 0.0)
        scale = tl.max(magnitude, axis=0)
        ratio = magnitude / tl.maximum(scale, 1.1754943508222875e-38)
        root = tl.sqrt(ratio) if SIGNED else tl.sqrt(tl.sqrt(ratio))
        low = tl.minimum(tl.floor(root * levels), levels - 1)
        low_value = _power(low * (1 / levels), SIGNED)
        high_value = _power((low + 1) * (1 / levels), SIGNED)
        up = (ratio - low_value) / (high_value - low_value)
        code = low + tl.where(random16.to(tl.float32) / 65536 < up, 1.0, 0.0)
        if SIGNED:
            code = tl.where(x < 0, -code, code)
            tl.store(ptr + offsets, code.to(tl.int8), mask=mask)
        else:
            code = tl.where((x > 0) & (code < 1), 1.0, code)
            tl.store(ptr + offsets, code.to(tl.int32).to(tl.uint8), mask=mask)
        tl.store(scale_ptr + block, scale)
    elif KIND == 1:
        tl.store(ptr + offsets, _round_to_bf16(x, random16), mask=mask)
    else:
        tl.store(ptr + offsets, x, mask=mask)


# Scalars of one parameter are entries of vectors: compiled once, wherever such an entry lies.
_SCALARS = ["step_ptr", "correction1_ptr", "correction2_ptr", "found_inf_ptr", "lr"]


@triton.jit(do_not_specialize=["start", "key", "count"], do_not_specialize_on_alignment=_SCALARS)
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
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < count

    weight = tl.load(param_ptr + offsets, mask=mask, other=0)
    if WEIGHT == 2:
        residual = tl.load(master_ptr + offsets, mask=mask, other=0)
        high = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
        p = (high + residual.to(tl.int32)).to(tl.float32, bitcast=True)
    elif WEIGHT == 3:
        p = tl.load(master_ptr + offsets, mask=mask, other=0)
    else:
        p = weight.to(tl.float32)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    m = _load_moment(m_ptr, m_scale_ptr, offsets, mask, block, MOMENTS, True)
    v = _load_moment(v_ptr, v_scale_ptr, offsets, mask, block, MOMENTS, False)

    p = p * decay
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    v_used = v
    if AMSGRAD:
        v_max = _load_moment(v_max_ptr, v_max_scale_ptr, offsets, mask, block, MOMENTS, False)
        v_max = tl.maximum(v_max, v)
        v_used = v_max
    root = tl.div_rn(tl.sqrt_rn(v_used), tl.load(correction2_ptr) + tl.zeros_like(v))
    p = p - (lr / tl.load(correction1_ptr)) * tl.div_rn(m, root + eps)

    stream = _hash32(tl.load(step_ptr).to(tl.int32).to(tl.uint32) + key.to(tl.uint32))
    index = offsets.to(tl.uint32) + start.to(tl.uint32)
    first = _hash32(_hash32(index) ^ stream)
    _store_moment(m_ptr, m_scale_ptr, m, first & 0xFFFF, offsets, mask, block, MOMENTS, True)
    _store_moment(v_ptr, v_scale_ptr, v, first >> 16, offsets, mask, block, MOMENTS, False)
    if AMSGRAD:
        _store_moment(v_max_ptr, v_max_scale_ptr, v_max, first >> 16, offsets, mask, block, MOMENTS, False)
    if WEIGHT == 2:
        bits = p.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        residual = (bits - (high << 16)).to(tl.int16)
        high = tl.where(p == p, high, 0x7FC0).to(tl.int16)
        tl.store(param_ptr + offsets, high.to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(master_ptr + offsets, residual, mask=mask)
    elif WEIGHT == 3:
        tl.store(master_ptr + offsets, p, mask=mask)
        tl.store(param_ptr + offsets, p.to(param_ptr.dtype.element_ty), mask=mask)
    elif WEIGHT == 1:
        second = _hash32(first ^ 0x9E3779B9)
        tl.store(param_ptr + offsets, _round_to_bf16(p, second & 0xFFFF), mask=mask)
    else:
        tl.store(param_ptr + offsets, p, mask=mask)


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
        start, key: the slice's first element in its parameter, and the stream of its random bits.
        found_inf: one fp32 element; not zero: nothing changes.
    """
    moments = 2 if SCALE_OF["exp_avg"] in states else int(states["exp_avg"].dtype == torch.bfloat16)
    if "residual" in states:
        weight = SPLIT
    elif "master" in states:
        weight = WHOLE
    else:
        weight = ROUNDED if param.dtype == torch.bfloat16 else PLAIN
    # Rounded to fp32 once, as in torch.optim.AdamW: 1.4e-8 of 1 - 1e-5, which 100 steps make 1.4e-6 of the weight.
    decay = weight_decay if isinstance(lr, Tensor) else 1 - lr * weight_decay
    count = param.numel()
    field = states.get  # a pointer that is None costs the host nothing: Triton asks CUDA about every other one
    _adamw_kernel[(triton.cdiv(count, BLOCK),)](
        param, grad, field("residual", field("master")), field("exp_avg"), field("exp_avg_sq"), field("max_exp_avg_sq"),
        field("exp_avg_scale"), field("exp_avg_sq_scale"), field("max_exp_avg_sq_scale"),
        step, *corrections, found_inf, lr,
        beta1, 1 - beta1, beta2, 1 - beta2, eps, decay, count, _signed(start), _signed(key),
        WEIGHT=weight, MOMENTS=moments, AMSGRAD="max_exp_avg_sq" in states, MAXIMIZE=maximize,
        LR_IS_TENSOR=isinstance(lr, Tensor), BLOCK_SIZE=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def _signed(x: int) -> int:
    """The int32 with the low 32 bits of ``x``, so that every slice finds the kernel compiled for int32."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x
