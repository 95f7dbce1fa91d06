"""``lowprec::scaled_grouped_matmul``: the product of groups of rows, each with its own e4m3 matrix, as the experts of a
mixture have them. Where a group ends stays on the device."""

from functools import cache

import torch
from lowprec_kernels.scaled_grouped_matmul import reference

from lowprec.errors import UserError
from lowprec.ops.backends import FP8, Backend, choose, define

CAPABILITY = (9, 0)
"""PyTorch compiles its kernel for row scales for this one alone (ScaledGroupMM.cu)."""
MOST_GROUPS = 1023
"""Of ``torch._scaled_grouped_mm``, which prepares all of them in one block of threads."""


@cache
def no_grouped_product(device: torch.device) -> str | None:
    """Why no kernel multiplies groups in e4m3 on ``device``."""
    if device.type != "cuda":
        return f"torch._scaled_grouped_mm runs on CUDA devices, the tensor is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"torch._scaled_grouped_mm needs compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def _no_torch(a, scale_a, b, scale_b, offsets, out_dtype, fast_accumulation) -> str | None:
    if a.dtype != FP8 or b.dtype != FP8:
        return "torch._scaled_grouped_mm takes fp8 only"
    if b.shape[0] > MOST_GROUPS:
        return f"torch._scaled_grouped_mm takes at most {MOST_GROUPS} groups"
    if b.shape[1] % 16 or b.shape[2] % 16:
        return "dimensions must be multiples of 16"
    return no_grouped_product(a.device)


def _run_torch(a, scale_a, b, scale_b, offsets, out_dtype, fast_accumulation) -> torch.Tensor:
    """Its results are bf16 alone."""
    y = torch._scaled_grouped_mm(
        a, b.mT, scale_a, scale_b, offs=offsets, out_dtype=torch.bfloat16, use_fast_accum=fast_accumulation
    )
    return y.to(out_dtype)


BACKENDS = (
    Backend("torch._scaled_grouped_mm", _run_torch, _no_torch),
    Backend("reference", reference.scaled_grouped_matmul),
)


def _run(a, scale_a, b, scale_b, offsets, out_dtype=torch.bfloat16, fast_accumulation=False):
    if a.shape[0] == 0:
        return _fake(a, scale_a, b, scale_b, offsets, out_dtype)
    args = (a, scale_a, b, scale_b, offsets, out_dtype, fast_accumulation)
    if a.device.type == "cuda" and (reason := _no_torch(*args)) is not None:
        # The reference would run there group by group, each waited for: who wants that calls it by itself.
        raise UserError(
            f"Fused experts that are stored in fp8 cannot be multiplied on {a.device}: {reason}. wrap() took them for "
            'those of another device: name the one that the model will run on, wrap(model, "fp8", device="cuda"), '
            'which leaves such experts in 16 bits and reports why, or leave them alone by rules={"*.experts": "bf16"} '
            "(in a recipe, wrap.rules=[*.experts:bf16])."
        )
    return choose(BACKENDS, *args).run(*args)


def _fake(a, scale_a, b, scale_b, offsets, out_dtype=torch.bfloat16, fast_accumulation=False):
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)


scaled_grouped_matmul = define(
    "scaled_grouped_matmul(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, Tensor offsets,"
    " ScalarType out_dtype=bfloat16, bool fast_accumulation=False) -> Tensor",
    _run,
    _fake,
)
"""``scaled_grouped_matmul(a, scale_a, b, scale_b, offsets, out_dtype=torch.bfloat16, fast_accumulation=False)``:
``a [M, K]``, ``b [groups, N, K]`` with contiguous rows, scales ``[M]`` and ``[groups, N]``, int32 ``offsets [groups]``,
give ``[M, N]``; see the reference."""
