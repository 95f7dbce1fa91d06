"""The output head and its cross-entropy, a chunk of tokens at a time: the logits of one chunk are all there ever is.

L = sum_t cross_entropy(h_t W^T + b). Where gradients are asked for, each chunk's are made with its loss, in forward:
E_H = E_Z W and, where the head trains, G += E_Z^T H, with E_Z = softmax - onehot in the place of the logits. Backward
multiplies what is ready by the gradient that arrives. (Liger's fused function, whose idea this is, reads two counts
back from the device in every call, so the host would wait; and its chunks are sized for the least memory alone.)
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowprec.ops.cross_entropy import cross_entropy_

FROZEN_CHUNK_BYTES = 128 * 2**20
TRAINED_CHUNK_BYTES = 512 * 2**20
"""Bytes of a chunk's logits. Each chunk of a trained head reads and writes its whole weight gradient, so there are
fewer of them."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Summed cross-entropy of ``hidden [rows, in]`` multiplied by ``weight [classes, in]``; fp32 (fp64 of fp64).

    Products run in autocast's dtype where it is on, else in that of ``hidden``.

    Args:
        hidden: the rows that are trained.
        targets: int64 ``[rows]``; a row with a negative one counts nothing.
        bias: ``[classes]``.
        scale: what the logits are multiplied by.
        softcap: the bound that tanh keeps them below; 0 for none.
        chunk_rows: rows of a chunk; None chooses by the bytes of its logits.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if dtype != hidden.dtype and hidden.dtype == torch.float64:
        dtype = torch.float64  # autocast leaves fp64 alone
    # Casts of autograd's own: gradients come back in the dtypes of what was given.
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    trained = torch.is_grad_enabled() and weight.requires_grad
    rows = chunk_rows or rows_of_chunk(weight.shape[0], dtype.itemsize, trained)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
            return _LinearCrossEntropy.apply(hidden, weight, bias, targets, scale, softcap, rows)
        return _chunks(hidden, weight, bias, targets, scale, softcap, rows, (False, False, False))[0]


def head_cross_entropy(
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """The same for a head that is more than one product (adapters, 8-bit codes, hooks): its chunks are computed again
    in backward, which costs one more product with the head."""

    def chunk_loss(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        z = head(rows)
        z = (z if z.dtype == torch.float64 else z.float()) * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return F.cross_entropy(z, wanted, ignore_index=-100, reduction="sum")

    classes = getattr(head, "out_features", None) or head(hidden[:1]).shape[-1]
    rows = chunk_rows or rows_of_chunk(classes, 4, trained=False)
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    losses = [checkpoint(chunk_loss, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(losses).sum()  # type: ignore[arg-type]  # of no row, split gives one empty chunk


def rows_of_chunk(classes: int, itemsize: int, trained: bool) -> int:
    """Rows whose logits fill a chunk: a multiple of 128, as the tiles of a product are, and at least that."""
    budget = TRAINED_CHUNK_BYTES if trained else FROZEN_CHUNK_BYTES
    return max(128, budget // (classes * itemsize) // 128 * 128)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, scale, softcap, rows) -> torch.Tensor:
        loss, *gradients = _chunks(hidden, weight, bias, targets, scale, softcap, rows, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        hidden, weight, bias = ctx.saved_tensors
        return (
            None if hidden is None else hidden * grad.to(hidden.dtype),
            # In place: a second copy would be the largest tensor of a step. Autograd refuses a second backward by it.
            None if weight is None else weight.mul_(grad.to(weight.dtype)),
            None if bias is None else bias * grad.to(bias.dtype),
            *[None] * 4,
        )


def _chunks(hidden, weight, bias, targets, scale, softcap, rows, needed):
    """The loss, and the gradients that ``needed`` asks for (None for the others): of hidden, weight and bias."""
    needs_hidden, needs_weight, needs_bias = needed
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    if grad_weight is not None and not hidden.shape[0]:
        grad_weight.zero_()
    grad_bias = torch.zeros_like(bias) if needs_bias else None
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
    logits = hidden.new_empty(min(rows, hidden.shape[0]), weight.shape[0])
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        h = hidden[part]
        z = logits[: h.shape[0]]
        torch.mm(h, weight.t(), out=z)
        if bias is not None:
            z += bias
        losses[part] = cross_entropy_(z, targets[part], scale, softcap, any(needed))
        if grad_hidden is not None:
            torch.mm(z, weight, out=grad_hidden[part])
        if grad_weight is not None:
            torch.addmm(grad_weight, z.t(), h, beta=int(start > 0), out=grad_weight)
        if grad_bias is not None:
            grad_bias += z.sum(0, dtype=wide)
    return losses.sum(), grad_hidden, grad_weight, grad_bias
