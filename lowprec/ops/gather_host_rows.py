"""``lowprec::gather_host_rows``: rows of a table that stays in host memory."""

import torch
from lowprec_kernels.host_rows import reference

from lowprec.ops.backends import Backend, choose, define, lazily, no_triton


def _no_triton(ids: torch.Tensor, weight: torch.Tensor) -> str | None:
    reason = no_triton(ids.device)
    if reason is None and not weight.is_contiguous():
        reason = "the table is not contiguous"
    if reason is None and not (weight.is_cuda or weight.is_pinned()):
        reason = "the table is not pinned, so the GPU cannot read it"
    return reason


BACKENDS = (
    Backend("triton", lazily("host_rows.triton_kernel", "gather_host_rows"), _no_triton),
    Backend("reference", reference.gather_host_rows),
)
"""On a GPU the reference waits for the device: it brings the ids to the host."""


def _run(ids, weight):
    return choose(BACKENDS, ids, weight).run(ids, weight)


def _fake(ids, weight):
    return ids.new_empty((*ids.shape, weight.shape[1]), dtype=weight.dtype)


gather_host_rows = define("gather_host_rows(Tensor ids, Tensor weight) -> Tensor", _run, _fake)
"""``gather_host_rows(ids, weight)``: ``weight[ids]`` on the device of ``ids``, bit for bit, NaN for an id outside the
table; it has no gradient. See the reference."""
