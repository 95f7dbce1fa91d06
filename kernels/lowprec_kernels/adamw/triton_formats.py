"""The formats of reference.py and their random bits as Triton functions of numbers that a program holds."""

import triton
import triton.language as tl


@triton.jit
def mix32(x):
    x = x * 0x9E3779B9
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hash32(x):
    return mix32(x ^ (x >> 16))


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def round_to_bf16(x, random16):
    """Sums above bf16's largest number, infinities and NaN are cut: they take no bits that could carry."""
    bits = as_bits(x)
    bits = tl.where(tl.abs(x) < 3.3895313892515355e38, bits + random16, bits)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


# Codes and random bits are read and codes written without conversions to and from integers. The bits of a small integer
# n are the subnormal n 2^-149, and products with subnormals are exact. A sum with 1.5 * 2^16 rounds to multiples of
# 1/128, with 1.5 * 2^15 to multiples of 1/256, and counts them in its last byte: the code. Hence these units:
# m = s t|t| with t = q/128 and s = (128/127)^2 scale; v = s t^4 with t = q/256 and s = (256/255)^4 scale.


@triton.jit
def decode_m(codes, scale):
    t = as_float((codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32)) * 2.0**127 - 2.0**-15  # q / 2^22
    return (t * (scale * (2**15 * 128 / 127) ** 2)) * tl.abs(t)


@triton.jit
def decode_v(codes, scale):
    t = as_float(codes.to(tl.uint32)) * 2.0**127  # q / 2^22
    t2 = t * t
    return (t2 * (scale * (2**14 * 256 / 255) ** 4)) * t2


@triton.jit
def encode_m(m, random, scale):
    """Codes of the numbers of a block, whose largest is ``scale``, by the low half of ``random``.

    With x = 127^2 |m| / scale and r in [0, 1), rounding up from q where x > q^2 + r (2 q + 1) = (q + r)^2 + r - r^2 is
    rounding sqrt(x - r + r^2) - r up to a whole number.
    """
    r = as_float(random & 0xFFFF) * 2.0**126 - 2.0**-8  # (r - 1/2) / 128
    inverse = tl.rsqrt(scale)
    unit = (1 - 2.0**-20) * (127 / 128) ** 2 * inverse * inverse  # a little less: 127 must not be rounded up
    root = tl.sqrt(tl.maximum(tl.abs(m) * unit + (r * r - 2.0**-16), 0.0)) - r
    signed = as_float(as_bits(root) ^ (as_bits(m) & 0x80000000))
    return (as_bits(signed + 98304.0) & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit
def encode_v(v, root, random, scale):
    """As above, by the high half of ``random``; ``root`` is that of v.

    Up from q where x > q^4 + r ((q + 1)^4 - q^4), which with c = q + 1/2 and p = r - 1/2 is
    c^4 + 4 p c^3 + 3/2 c^2 + p c + 1/16; from 0 always, where v is positive.
    """
    p = as_float(random >> 16) * 2.0**109 - 2.0**-25  # (r - 1/2) / 2^24
    inverse = tl.rsqrt(scale)
    # A little less: the largest v must be rounded up from 254. One that is a code is rounded up from the code below.
    floor = tl.sqrt(root) * ((1 - 2.0**-18) * (255 / 256) * tl.sqrt(inverse)) - 2.0**-9 + 49152.0
    q = floor - 49152.0
    c = q + 2.0**-9
    bound = c * (c * (c * (p * 2.0**18 + c) + 1.5 * 2.0**-16) + p) + 2.0**-36
    up = v * ((255 / 256) ** 4 * inverse * inverse) > tl.minimum(bound, q * 2.0**60)
    return (as_bits(tl.where(up, floor + 2.0**-8, floor)) & 0xFF).to(tl.uint8)
