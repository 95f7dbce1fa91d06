"""``lowprec::cross_entropy_``: losses of rows of logits, with the gradient left in the place of the logits."""

import torch
from lowprec_kernels.cross_entropy import reference

from lowprec.ops.backends import Backend, choose, define, lazily, no_triton


def _no_triton(logits, targets, scale, softcap, gradient) -> str | None:
    if logits.dtype == torch.float64:
        return "fp64 runs in the reference"
    if logits.stride(-1) != 1:
        return "the rows of the logits are not contiguous"
    return no_triton(logits.device)


BACKENDS = (
    Backend("triton", lazily("cross_entropy.triton_kernel", "cross_entropy_"), _no_triton),
    Backend("reference", reference.cross_entropy_),
)


def _run(logits, targets, scale=1.0, softcap=0.0, gradient=True):
    arguments = (logits, targets, scale, softcap, gradient)
    return choose(BACKENDS, *arguments).run(*arguments)


def _fake(logits, targets, scale=1.0, softcap=0.0, gradient=True):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], dtype=dtype)


cross_entropy_ = define(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, float scale=1.0, float softcap=0.0, bool gradient=True)"
    " -> Tensor",
    _run,
    _fake,
)
