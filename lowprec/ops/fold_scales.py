"""``lowprec::fold_scales``: scales along a sum as factors of the codes that they belong to, and one for the product."""

import torch
from lowprec_kernels.quantize_rows import reference

from lowprec.ops.backends import Backend, choose, define, lazily, no_triton

MOST_ROWS = 2**16
"""Of the kernel, which is one program: many would be faster for more."""


def _why_not(scale: torch.Tensor, partner: torch.Tensor | None, copies: int) -> str | None:
    if not 0 < scale.shape[0] <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows"
    if scale.dtype != torch.float32:
        return "scales must be fp32"
    return no_triton(scale.device)


BACKENDS = (
    Backend("triton", lazily("quantize_rows.fold_kernel", "fold_scales"), _why_not),
    Backend("reference", reference.fold_scales),
)


def _run(scale, partner=None, copies=1):
    return choose(BACKENDS, scale, partner, copies).run(scale, partner, copies)


def _fake(scale, partner=None, copies=1):
    return torch.empty_like(scale), scale.new_empty(copies)


fold_scales = define("fold_scales(Tensor scale, Tensor? partner=None, int copies=1) -> (Tensor, Tensor)", _run, _fake)
"""``fold_scales(scale, partner=None, copies=1)``: ``scale [rows]`` (times ``partner [rows]``) over their largest,
``[rows]``, and that largest, ``[copies]``."""
