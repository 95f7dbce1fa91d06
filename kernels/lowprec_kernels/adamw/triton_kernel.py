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

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec_kernels.adamw.reference import BLOCK, SCALE_OF

PLAIN, ROUNDED, SPLIT, WHOLE = range(4)  # where fp32 weights come from: the weight, a rounded one, residual, master


def why_not(param: Tensor) -> str | None:
    """Why the kernel cannot update ``param``, or None."""
    return None if param.is_cuda else f"the parameter is on {param.device}, not on a CUDA device"


@triton.jit
def _mix32(x):
    x = x * 0x9E3779B9
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _hash32(x):
    return _mix32(x ^ (x >> 16))


@triton.jit
def _as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _as_bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _round_to_bf16(x, random16):
    """Sums above bf16's largest number, infinities and NaN are cut: they take no bits that could carry."""
    bits = _as_bits(x)
    bits = tl.where(tl.abs(x) < 3.3895313892515355e38, bits + random16, bits)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


# Codes and random bits are read and codes written without conversions to and from integers. The bits of a small integer
# n are the subnormal n 2^-149, and products with subnormals are exact. A sum with 1.5 * 2^16 rounds to multiples of
# 1/128, with 1.5 * 2^15 to multiples of 1/256, and counts them in its last byte: the code. Hence these units:
# m = s t|t| with t = q/128 and s = (128/127)^2 scale; v = s t^4 with t = q/256 and s = (256/255)^4 scale.


@triton.jit
def _decode_m(codes, scale):
    t = _as_float((codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32)) * 2.0**127 - 2.0**-15  # q / 2^22
    return (t * (scale * (2**15 * 128 / 127) ** 2)) * tl.abs(t)


@triton.jit
def _decode_v(codes, scale):
    t = _as_float(codes.to(tl.uint32)) * 2.0**127  # q / 2^22
    t2 = t * t
    return (t2 * (scale * (2**14 * 256 / 255) ** 4)) * t2


@triton.jit
def _encode_m(m, random, scale):
    """Codes of the numbers of a block, whose largest is ``scale``, by the low half of ``random``.

    With x = 127^2 |m| / scale and r in [0, 1), rounding up from q where x > q^2 + r (2 q + 1) = (q + r)^2 + r - r^2 is
    rounding sqrt(x - r + r^2) - r up to a whole number.
    """
    r = _as_float(random & 0xFFFF) * 2.0**126 - 2.0**-8  # (r - 1/2) / 128
    inverse = tl.rsqrt(scale)
    unit = (1 - 2.0**-20) * (127 / 128) ** 2 * inverse * inverse  # a little less: 127 must not be rounded up
    root = tl.sqrt(tl.maximum(tl.abs(m) * unit + (r * r - 2.0**-16), 0.0)) - r
    signed = _as_float(_as_bits(root) ^ (_as_bits(m) & 0x80000000))
    return (_as_bits(signed + 98304.0) & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit
def _encode_v(v, root, random, scale):
    """As above, by the high half of ``random``; ``root`` is that of v.

    Up from q where x > q^4 + r ((q + 1)^4 - q^4), which with c = q + 1/2 and p = r - 1/2 is
    c^4 + 4 p c^3 + 3/2 c^2 + p c + 1/16; from 0 always, where v is positive.
    """
    p = _as_float(random >> 16) * 2.0**109 - 2.0**-25  # (r - 1/2) / 2^24
    inverse = tl.rsqrt(scale)
    # A little less: the largest v must be rounded up from 254. One that is a code is rounded up from the code below.
    floor = tl.sqrt(root) * ((1 - 2.0**-18) * (255 / 256) * tl.sqrt(inverse)) - 2.0**-9 + 49152.0
    q = floor - 49152.0
    c = q + 2.0**-9
    bound = c * (c * (c * (p * 2.0**18 + c) + 1.5 * 2.0**-16) + p) + 2.0**-36
    up = v * ((255 / 256) ** 4 * inverse * inverse) > tl.minimum(bound, q * 2.0**60)
    return (_as_bits(tl.where(up, floor + 2.0**-8, floor)) & 0xFF).to(tl.uint8)


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
    rate = lr / tl.load(correction1_ptr)
    correction2 = tl.load(correction2_ptr)
    stream = _hash32(tl.load(step_ptr).to(tl.int32).to(tl.uint32) + key.to(tl.uint32))
    column = tl.arange(0, BLOCK_SIZE)

    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK_SIZE
    offsets = first + column
    mask = offsets < count

    weight = tl.load(param_ptr + offsets, mask=mask, other=0)
    if WEIGHT == 2:
        residual = tl.load(master_ptr + offsets, mask=mask, other=0)
        high = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
        p = _as_float(high + residual.to(tl.int32))
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
        m = _decode_m(m, beta1 * tl.load(m_scale_ptr + block))
        v = _decode_v(v, beta2 * tl.load(v_scale_ptr + block))
        if AMSGRAD:
            v_max = _decode_v(v_max, tl.load(v_max_scale_ptr + block))
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

    random = _mix32(_hash32((start + first).to(tl.uint32) ^ stream) + column.to(tl.uint32))
    if MOMENTS == 2:
        smallest = 1.1754943508222875e-38
        m_scale, v_scale = tl.max(tl.abs(m), axis=0), tl.max(v, axis=0)
        tl.store(m_scale_ptr + block, m_scale)
        tl.store(v_scale_ptr + block, v_scale)
        m_code = _encode_m(m, random, tl.maximum(m_scale, smallest))
        v_code = _encode_v(v, tl.sqrt(v), random, tl.maximum(v_scale, smallest))
        tl.store(m_ptr + offsets, m_code, mask=mask)
        tl.store(v_ptr + offsets, v_code, mask=mask)
        if AMSGRAD:
            scale = tl.max(v_max, axis=0)
            tl.store(v_max_scale_ptr + block, scale)
            code = _encode_v(v_max, tl.sqrt(v_max), random, tl.maximum(scale, smallest))
            tl.store(v_max_ptr + offsets, code, mask=mask)
    elif MOMENTS == 1:
        tl.store(m_ptr + offsets, _round_to_bf16(m, random & 0xFFFF), mask=mask)
        tl.store(v_ptr + offsets, _round_to_bf16(v, random >> 16), mask=mask)
        if AMSGRAD:
            tl.store(v_max_ptr + offsets, _round_to_bf16(v_max, random >> 16), mask=mask)
    else:
        tl.store(m_ptr + offsets, m, mask=mask)
        tl.store(v_ptr + offsets, v, mask=mask)
        if AMSGRAD:
            tl.store(v_max_ptr + offsets, v_max, mask=mask)

    if WEIGHT == 2:
        bits = _as_bits(p)
        high = (tl.where(p == p, bits + 0x8000, bits) >> 16).to(tl.uint16)
        tl.store(param_ptr + offsets, high.to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(master_ptr + offsets, (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    elif WEIGHT == 3:
        tl.store(master_ptr + offsets, p, mask=mask)
        tl.store(param_ptr + offsets, p.to(param_ptr.dtype.element_ty), mask=mask)
    elif WEIGHT == 1:
        tl.store(param_ptr + offsets, _round_to_bf16(p, (random * 0x9E3779B9) >> 16), mask=mask)
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
        start, key: the slice's first element in its parameter, a multiple of BLOCK, and the stream of its random bits.
        found_inf: one fp32 element; not zero: nothing changes.
    """
    assert start % BLOCK == 0
    moments = 2 if SCALE_OF["exp_avg"] in states else int(states["exp_avg"].dtype == torch.bfloat16)
    if "residual" in states:
        weight = SPLIT
    elif "master" in states:
        weight = WHOLE
    else:
        weight = ROUNDED if param.dtype == torch.bfloat16 else PLAIN
    # Rounded to fp32 once, as in torch.optim.AdamW: 1.4e-8 of 1 - 1e-5, which 100 steps make 1.4e-6 of the weight.
    decay = weight_decay if isinstance(lr, Tensor) else 1 - lr * weight_decay
    # A thread holds 16 bytes of the widest field, four or eight elements, for which all fields have one layout.
    num_warps = 2 if param.dtype == torch.float32 or "master" in states or moments == 0 else 1
    count = param.numel()
    field = states.get  # a pointer that is None costs the host nothing: Triton asks CUDA about every other one
    _adamw_kernel[(triton.cdiv(count, BLOCK),)](
        param, grad, field("residual", field("master")), field("exp_avg"), field("exp_avg_sq"), field("max_exp_avg_sq"),
        field("exp_avg_scale"), field("exp_avg_sq_scale"), field("max_exp_avg_sq_scale"),
        step, *corrections, found_inf, lr,
        beta1, 1 - beta1, beta2, 1 - beta2, eps, decay, count, _signed(start), _signed(key),
        WEIGHT=weight, MOMENTS=moments, AMSGRAD="max_exp_avg_sq" in states, MAXIMIZE=maximize,
        LR_IS_TENSOR=isinstance(lr, Tensor), BLOCK_SIZE=BLOCK, num_warps=num_warps,
    )  # fmt: skip


def _signed(x: int) -> int:
    """The int32 with the low 32 bits of ``x``, so that every slice finds the kernel compiled for int32."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x
