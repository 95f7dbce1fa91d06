"""Apply AdamW to slices of parameters, by the fastest way that their format and device allow.

fp32 weights with fp32 moments: torch's fused AdamW, in place. Other formats: the Triton kernel on CUDA; elsewhere
decode, torch's fused AdamW on fp32 copies, encode. The result of an element does not depend on the slice it is
updated in,
as long as slices begin at multiples of BLOCK: torch's CPU kernel rounds the last elements of an array, which do not
fill a vector, differently (5,000 random elements cut at 1,001: 4 of them off by an ulp; cut at 1,024: none).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lowprec_kernels.adamw.reference as reference
import torch
from torch import Tensor

from lowprec.optim.layout import Piece
from lowprec.optim.steps import Hyper, Steps

# Elements that the decoding path converts at once: bounds its fp32 copies to 64 MiB. A multiple of BLOCK.
SLICE = 1 << 22
FEWEST_TOGETHER = 4
"""Slices that are worth a table, which is copied to the device before its launch."""


@dataclass(frozen=True)
class Slice:
    """One piece of a parameter with its states, on the device of its update: what stays from step to step.

    ``weights`` is the piece of the parameter, ``param`` the same or a copy on the update's device. ``param`` and
    ``states`` are updated in place. They are flat, but in the parameter's shape where fp32 AdamW updates all of it,
    because torch wants the gradient, which then needs no view, in the same shape. ``key`` seeds the random bits.
    ``address`` is the parameter's when the slice was made: code may give it other memory (``param.data = ...``).
    """

    piece: Piece
    weights: Tensor
    param: Tensor
    states: dict[str, Tensor]
    steps: Steps
    key: int
    is_plain: bool
    is_whole: bool
    address: int

    @classmethod
    def of(cls, parameter: Tensor, piece: Piece, states: dict[str, Tensor], steps: Steps, key: int) -> "Slice":
        weights = parameter.detach()
        is_plain = weights.dtype == states["exp_avg"].dtype == torch.float32
        is_whole = piece.stop - piece.start == weights.numel()
        if is_plain and is_whole:
            states = {name: array.view(weights.shape) for name, array in states.items()}
        else:
            weights = weights.view(-1)[piece.start : piece.stop]
        param = weights.to(steps.device)
        return cls(piece, weights, param, states, steps, key, is_plain, is_whole, parameter.data_ptr())

    @cached_property
    def place(self) -> dict[str, Any]:
        """What the kernel must know of the slice beside its tensors."""
        i, steps = self.piece.parameter, self.steps
        corrections = steps.firsts[i], steps.seconds[i]
        return {"step": steps.counts[i], "corrections": corrections, "start": self.piece.start, "key": self.key}

    @cached_property
    def table_row(self) -> Tensor | None:
        """The slice as a row of the kernel's table; None where it is to be launched by itself."""
        from lowprec_kernels.adamw.triton_kernel import table_row

        return table_row(self.param, self.states, **self.place)

    def gradient(self, grad: Tensor) -> Tensor:
        """The slice's part of its parameter's gradient, on the update's device, contiguous."""
        if self.is_whole and grad.is_contiguous() and grad.device == self.steps.device:
            return grad
        part = grad.contiguous()
        part = part if self.is_whole else part.view(-1)[self.piece.start : self.piece.stop]
        return part.to(self.steps.device)


_Pair = tuple[Slice, Tensor]  # with its gradient


def update(slices: Sequence[_Pair], found_inf: Tensor | None) -> None:
    """Update slices with their gradients in place; where ``found_inf`` (fp32, one element) is not zero, nothing.

    ``found_inf`` may be None. torch's fused AdamW takes it for set where it is one.
    """
    together: dict[Steps, list[_Pair]] = {}
    for each in slices:
        together.setdefault(each[0].steps, []).append(each)
    for steps, group in together.items():
        flag = None if found_inf is None else found_inf.to(steps.device)
        plain = [each for each in group if each[0].is_plain]
        coded = group if not plain else [each for each in group if not each[0].is_plain]
        if plain:
            _update_plain(plain, steps, flag)
        if coded and steps.device.type == "cuda":
            _update_on_gpu(coded, steps, flag)
        else:
            for part, grad in coded:
                for start in range(0, part.param.numel(), SLICE):
                    stop = min(start + SLICE, part.param.numel())
                    _update_decoded(part, grad.view(-1)[start:stop], start, stop, flag)


def _update_plain(slices: list[_Pair], steps: Steps, found_inf: Tensor | None) -> None:
    _fused(
        steps.hyper,
        [part.param for part, _ in slices],
        [grad if grad.dtype == torch.float32 else grad.float() for _, grad in slices],
        [part.states["exp_avg"] for part, _ in slices],
        [part.states["exp_avg_sq"] for part, _ in slices],
        [part.states["max_exp_avg_sq"] for part, _ in slices if "max_exp_avg_sq" in part.states],
        [steps.counts[part.piece.parameter] for part, _ in slices],
        found_inf,
    )


def _update_on_gpu(slices: list[_Pair], steps: Steps, found_inf: Tensor | None) -> None:
    # Imported where it runs: lowprec itself needs no Triton.
    from lowprec_kernels.adamw import triton_kernel

    steps.correct()
    settings = {
        name: getattr(steps.hyper, name) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
    }
    settings["found_inf"] = found_inf
    # A table lies in host memory for one step only, so a graph that is captured must not read one.
    captured = torch.cuda.is_current_stream_capturing()
    alone, tables = (slices, []) if captured or len(slices) < FEWEST_TOGETHER else _in_tables(slices)
    for part, grad in alone:
        triton_kernel.run(part.param, grad, part.states, **part.place, **settings)
    for group in tables:
        first = group[0][0]
        rows = [row for part, _ in group if (row := part.table_row) is not None]
        triton_kernel.run_table(rows, [grad for _, grad in group], first.param, first.states, **settings)
    torch.autograd.graph.increment_version([part.param for part, _ in slices])  # the kernel writes by raw pointers


def _in_tables(slices: list[_Pair]) -> tuple[list[_Pair], list[list[_Pair]]]:
    """Slices that are launched one by one, and groups of small ones of one format that are launched together."""
    from lowprec_kernels.adamw.triton_kernel import ALIGNED

    alone: list[_Pair] = []
    groups: dict[tuple, list[_Pair]] = {}
    for part, grad in slices:
        if part.table_row is None or grad.data_ptr() % ALIGNED:
            alone.append((part, grad))
        else:
            format = part.param.dtype, grad.dtype, part.states["exp_avg"].dtype, *part.states
            groups.setdefault(format, []).append((part, grad))
    tables = [group for group in groups.values() if len(group) >= FEWEST_TOGETHER]
    return alone + [pair for group in groups.values() if len(group) < FEWEST_TOGETHER for pair in group], tables


def _fused(
    hyper: Hyper,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    found_inf: Tensor | None,
) -> None:
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=hyper.amsgrad,
        maximize=hyper.maximize,
        grad_scale=None,
        found_inf=found_inf,
    )


def _update_decoded(part: Slice, grad: Tensor, start: int, stop: int, found_inf: Tensor | None) -> None:
    """Decode elements ``start .. stop`` of the slice to fp32, update them by ``grad``, encode them back."""
    param = part.param[start:stop]
    states = {
        name: array[start:stop] if array.numel() == part.param.numel() else array[_block(start) : _block(stop)]
        for name, array in part.states.items()
    }
    step = part.steps.counts[part.piece.parameter]
    decoded = reference.decode(param, states)
    p, m, v = (x.clone() for x in decoded[:3])
    v_max = None if decoded[3] is None else decoded[3].clone()
    _fused(part.steps.hyper, [p], [grad.float()], [m], [v], [] if v_max is None else [v_max], [step], found_inf)
    dtypes = {"param": param.dtype} | {name: array.dtype for name, array in states.items()}
    bits = reference.random_bits(part.piece.start + start, stop - start, part.key, step)
    for name, value in reference.encode(p, m, v, v_max, dtypes, bits).items():
        target = param if name == "param" else states[name]
        target.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) == 0, value, target))


def _block(elements: int) -> int:
    return -(-elements // reference.BLOCK)
