"""``lowprec::decode_nf4``: a weight in bitsandbytes' 4-bit storage, decoded into a given tensor, as values or as 8-bit
codes in either orientation."""

import torch
from lowprec_kernels.nf4 import reference
from lowprec_kernels.nf4.reference import Packed

from lowprec.ops.backends import Backend, choose, define, lazily, no_rotation, no_triton


def _no_triton(weight: Packed, rows, out, scale, in_block, row_block, transposed) -> str | None:
    dim = out.shape[0] if transposed else out.shape[1]
    if dim % 16:
        return f"a row of {dim} is no multiple of 16"
    codes = None if scale is None else out.dtype
    return no_rotation(in_block) or no_rotation(row_block) or no_triton(out.device, codes)


def _no_bitsandbytes(weight: Packed, rows, out, scale, in_block, row_block, transposed) -> str | None:
    if scale is not None or in_block > 1:
        return "bitsandbytes decodes to 16 or 32 bits, unrotated"
    if out.device.type == "cpu" and out.shape[1] % weight.block_size:
        return "on a processor bitsandbytes 0.50.2 decodes wrongly where a row is no whole number of blocks"
    return None


def _run_bitsandbytes(weight: Packed, rows, out, scale, in_block, row_block, transposed) -> None:
    import bitsandbytes  # noqa: F401  # registers its ops

    absmax = reference.block_scales(weight)
    ops = torch.ops.bitsandbytes
    out.copy_(ops.dequantize_4bit(weight.packed, absmax, weight.block_size, "nf4", list(out.shape), out.dtype))


BACKENDS = (
    Backend("triton", lazily("nf4.triton_kernel", "decode_nf4"), _no_triton),
    Backend("bitsandbytes", _run_bitsandbytes, _no_bitsandbytes),
    Backend("reference", reference.decode_nf4),
)


def _run(
    packed, levels, absmax, block_size, absmax_levels, absmax_scale, absmax_offset, absmax_block,
    rows, out, scale=None, in_block=1, row_block=1, transposed=False,
):  # fmt: skip
    weight = Packed(packed, levels, absmax, block_size, absmax_levels, absmax_scale, absmax_offset, absmax_block)
    args = (weight, rows, out, scale, in_block, row_block, transposed)
    choose(BACKENDS, *args).run(*args)


decode_nf4 = define(
    "decode_nf4(Tensor packed, Tensor levels, Tensor absmax, int block_size, Tensor? absmax_levels,"
    " Tensor? absmax_scale, Tensor? absmax_offset, int absmax_block, int rows, Tensor(a!) out, Tensor? scale=None,"
    " int in_block=1, int row_block=1, bool transposed=False) -> ()",
    _run,
    lambda *args: None,
)
"""``decode_nf4(*weight, rows, out, scale=None, in_block=1, row_block=1, transposed=False)`` with ``weight`` a
``Packed``; see the reference."""
