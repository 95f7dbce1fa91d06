"""The definition of the AdamW update and of the formats its states are kept in.

The update is one pure function in the dtype of its arguments (fp32 in training, fp64 in tests):

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    p <- (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)   (Loshchilov & Hutter, arXiv 1711.05101)

Formats of one element, by field name:

    exp_avg, exp_avg_sq     fp32; or bf16; or 8-bit codes with one fp32 scale for BLOCK elements
    max_exp_avg_sq          as exp_avg_sq (amsgrad)
    residual                int16: the fp32 master minus the bf16 weight, in units of the master's last place
    master                  fp32 master of a bf16 or fp16 weight

8-bit codes are powers of a uniform grid, so that small values keep their relative precision without a table:
m = s (q/127)|q/127| with q in [-127, 127], v = s (q/255)^4 with q in [0, 255], s = max|.| over the block. The square
root of v, which is what the update uses, then has the resolution of m. A positive v never becomes zero, because the
update divides by its root.

Everything narrower than fp32 is rounded stochastically (the expectation is the value itself): with b2 = 0.999 a step
changes v by 0.1 %, less than half a code or half a bf16 ulp, and rounding to nearest would swallow it. The random bits
are a hash of (key, step, element), so that a run repeats, whatever chunk an element is updated in.
"""

import torch
from torch import Tensor

BLOCK = 256
MASK32 = 0xFFFFFFFF
SCALE_OF = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale", "max_exp_avg_sq": "max_exp_avg_sq_scale"}


def adamw(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    v_max: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One AdamW update of tensors of one shape and dtype; returns the new ``(p, m, v, v_max)``.

    ``step`` counts from 1. With ``v_max`` (amsgrad, Reddi et al. 2018) the running maximum of v takes v's place.
    """
    g = -g if maximize else g
    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    v_max = None if v_max is None else torch.maximum(v_max, v)
    denominator = ((v if v_max is None else v_max) / (1 - beta2**step)).sqrt() + eps
    return p - lr * (m / (1 - beta1**step)) / denominator, m, v, v_max


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers over int64 tensors of them: enough to tell the elements of a block apart."""
    x = (x * 0x9E3779B9) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def hash32(x: Tensor) -> Tensor:
    """The same after one more step, which lets high bits into low ones."""
    return mix32(x ^ (x >> 16))


def random_bits(start: int, count: int, key: int, step: Tensor) -> tuple[Tensor, Tensor]:
    """Two int64 tensors of 32 and of 16 random bits for the elements ``start .. start + count`` of one parameter.

    ``key`` stands for seed and parameter; ``step`` is a one-element tensor, so that no host sync is needed. The second
    is made of the first: independent of either of its halves, though not of both together.
    """
    index = torch.arange(start, start + count, dtype=torch.int64, device=step.device) & MASK32
    stream = hash32((step.reshape(()).to(torch.int64) + key) & MASK32)
    column = index % BLOCK
    first = mix32((hash32((index - column) ^ stream) + column) & MASK32)
    return first, ((first * 0x9E3779B9) & MASK32) >> 16


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 master -> (bf16 weight, int16 residual); ``join_master`` restores the master bit for bit.

    The weight is the master rounded to nearest. A tie goes away from zero (torch's cast goes to even): with ties to
    even, two masters would share a weight and a residual. A NaN's weight is NaN.
    """
    bits = master.contiguous().view(torch.int32)
    high = (bits.to(torch.int64) + 0x8000) >> 16
    residual = (bits.to(torch.int64) - (high << 16)).to(torch.int16)
    high = torch.where(high > 0x7FFF, high - 0x10000, high)  # the carry out of a NaN; masked below
    weight = high.to(torch.int16).view(torch.bfloat16)
    return torch.where(master.isnan(), torch.full_like(weight, float("nan")), weight), residual


def join_master(weight: Tensor, residual: Tensor) -> Tensor:
    """(bf16 weight, int16 residual) -> fp32 master."""
    bits = (weight.contiguous().view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)
    return bits.view(torch.float32)


def round_to_bf16(x: Tensor, random16: Tensor) -> Tensor:
    """fp32 -> bf16, up with the probability of the distance: add 16 random bits below the cut, then cut.

    Infinities and NaN stay what they are; a finite value never becomes infinite.
    """
    bits = x.contiguous().view(torch.int32).to(torch.int64) & MASK32
    rounded = bits + random16
    overflow = (rounded & 0x7F800000) == 0x7F800000
    rounded = torch.where(overflow, bits, rounded) >> 16
    rounded = torch.where(rounded > 0x7FFF, rounded - 0x10000, rounded)
    return torch.where(x.isnan(), x, rounded.to(torch.int16).view(torch.bfloat16).float()).to(torch.bfloat16)


def _blocks(x: Tensor) -> Tensor:
    padding = -x.numel() % BLOCK
    return torch.nn.functional.pad(x, (0, padding)).view(-1, BLOCK)


def encode8(x: Tensor, random16: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> (codes int8 or uint8 [n], scales fp32 [ceil(n / BLOCK)]); ``random16`` int64 [n] in [0, 2^16)."""
    blocks = _blocks(x)
    scale = blocks.abs().amax(1, keepdim=True)
    ratio = blocks.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)
    levels = 127 if signed else 255
    root = ratio.sqrt() if signed else ratio.sqrt().sqrt()
    low = (root * levels).floor().clamp_max(levels - 1)
    low_value, high_value = _power(low / levels, signed), _power((low + 1) / levels, signed)
    up = (ratio - low_value) / (high_value - low_value)
    code = low + (_blocks(random16).to(torch.float32) / 65536 < up)
    if not signed:
        code = torch.where((blocks > 0) & (code < 1), 1.0, code)
    code = code * blocks.sign() if signed else code
    codes = code.view(-1)[: x.numel()].to(torch.int8 if signed else torch.uint8)
    return codes, scale.view(-1)


def _power(t: Tensor, signed: bool) -> Tensor:
    return t * t if signed else (t * t) * (t * t)


def decode8(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The fp32 values of ``encode8``'s codes."""
    t = _blocks(codes.to(torch.float32)) / (127 if signed else 255)
    value = t * t.abs() if signed else (t * t) * (t * t)
    return (value * scale[:, None]).view(-1)[: codes.numel()]


def decode(param: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The fp32 ``(p, m, v, v_max)`` of a flat slice of a parameter and its states; fp32 fields are not copied."""
    p = join_master(param, states["residual"]) if "residual" in states else states.get("master", param).float()

    def moment(name: str) -> Tensor | None:
        if name not in states:
            return None
        if SCALE_OF[name] in states:
            return decode8(states[name], states[SCALE_OF[name]], signed=name == "exp_avg")
        return states[name].float()

    m, v = moment("exp_avg"), moment("exp_avg_sq")
    assert m is not None and v is not None, f"states without moments: {sorted(states)}"
    return p, m, v, moment("max_exp_avg_sq")


def encode(
    p: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None, dtypes: dict[str, torch.dtype], random: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """fp32 values -> the fields of ``dtypes`` (field name to dtype, ``param`` among them), in their formats.

    ``random`` is ``random_bits`` of the slice: the weight takes the second, the moments halves of the first.
    """
    first, second = random
    fields: dict[str, Tensor] = {}
    if "residual" in dtypes:
        fields["param"], fields["residual"] = split_master(p)
    elif "master" in dtypes:
        fields["param"], fields["master"] = p.to(dtypes["param"]), p
    else:
        fields["param"] = round_to_bf16(p, second) if dtypes["param"] == torch.bfloat16 else p
    for name, value, bits in (
        ("exp_avg", m, first & 0xFFFF),
        ("exp_avg_sq", v, first >> 16),
        ("max_exp_avg_sq", v_max, first >> 16),
    ):
        if value is None:
            continue
        if SCALE_OF[name] in dtypes:
            fields[name], fields[SCALE_OF[name]] = encode8(value, bits, signed=name == "exp_avg")
        else:
            fields[name] = round_to_bf16(value, bits) if dtypes[name] == torch.bfloat16 else value
    return fields
