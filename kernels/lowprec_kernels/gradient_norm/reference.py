"""The 2-norm of a gradient, and a flag that is raised where it is not finite: the definition."""

import torch
from torch import Tensor


def norm_(x: Tensor, norm: Tensor, found_inf: Tensor) -> None:
    """Write the norm of ``x`` (any shape) to ``norm`` (0-dim, fp32 or fp64), in whose dtype squares are summed.

    ``found_inf`` (one element) becomes 1 where the norm is infinite or NaN, and else stays what it is.
    """
    norm.copy_(torch.linalg.vector_norm(x, dtype=norm.dtype))
    found_inf.masked_fill_(~norm.isfinite(), 1)
