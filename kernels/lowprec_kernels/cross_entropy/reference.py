"""Cross-entropy of rows of logits, with the gradient left in the place of the logits: the definition.

z = softcap tanh(scale x / softcap), or scale x without a cap; the loss of a row is log sum exp z - z[target], and its
gradient (softmax(z) - onehot(target)) dz/dx. A row whose target is negative has loss 0 and gradient 0.
"""

import torch


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float, gradient: bool
) -> torch.Tensor:
    """The losses ``[rows]`` (fp32, or fp64 of fp64 logits) of ``logits [rows, classes]``.

    Args:
        logits: with ``gradient`` overwritten by d loss / d logits, each row's own; else left as it is.
        targets: int64 ``[rows]``.
        scale: what the logits are multiplied by before the softmax.
        softcap: the bound that tanh keeps the scaled logits below; 0 for none.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z * scale if scale != 1 else z
    capped = torch.tanh(z / softcap) if softcap else None
    z = capped * softcap if capped is not None else z
    normalizer = z.logsumexp(-1, keepdim=True)
    trained, index = targets >= 0, targets.clamp_min(0)[:, None]
    losses = (normalizer - z.gather(-1, index)).squeeze(-1).where(trained, 0)
    if gradient:
        slope = (z - normalizer).exp_()
        slope.scatter_add_(-1, index, torch.full_like(normalizer, -1.0))
        slope *= scale * trained[:, None]
        if capped is not None:
            slope *= 1 - capped.square_()
        logits.copy_(slope)
    return losses
