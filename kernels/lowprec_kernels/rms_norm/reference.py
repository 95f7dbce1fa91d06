"""The gradients of RMSNorm (Zhang and Sennrich, arXiv 1910.07467): the definition.

    y = (w + offset) n        n = x r        r = 1 / sqrt(mean(x^2) + eps)        rows of x and y: [rows, dim]
    dx = r (e - n mean(e n))  with e = dy (w + offset)                            dw = sum over rows of dy n

The rounding of n to the dtype of x, as Llama has it forward, is left out: the gradients are closer to exact ones.
"""

import torch
from torch import Tensor


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of the input, in its dtype, and of the weight, in its own.

    Args:
        grad: dy, ``[rows, dim]``; ``x`` likewise, in the same dtype; ``weight``: ``[dim]``.
        rstd: r, ``[rows]``, fp32, or fp64 with fp64 operands; all is computed in its dtype.
        weight_grad: whether dw is wanted; else it is empty.
    """
    wide = rstd.dtype
    normed = x.to(wide) * rstd[:, None]
    error = grad.to(wide) * (weight.to(wide) + offset)
    dx = rstd[:, None] * (error - normed * (error * normed).mean(-1, keepdim=True))
    dw = (grad.to(wide) * normed).sum(0) if weight_grad else torch.empty(0, device=x.device)
    return dx.to(x.dtype), dw.to(weight.dtype)
