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

import lowprec_kernels.adamw.reference as reference
import torch
from torch import Tensor

# Elements that the decoding path converts at once: bounds its fp32 copies to 64 MiB. A multiple of BLOCK.
SLICE = 1 << 22


@dataclass(frozen=True)
class Hyper:
    """The settings of one parameter group for one step."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool

    @classmethod
    def of(cls, group: dict) -> "Hyper":
        beta1, beta2 = group["betas"]
        rest = {name: group[name] for name in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
        return cls(beta1=beta1, beta2=beta2, **rest)


@dataclass(frozen=True)
class Steps:
    """The step counts of one group's update: ``counts`` fp32 [parameters], already counting this step."""

    counts: Tensor
    hyper: Hyper

    @cached_property
    def corrections(self) -> tuple[Tensor, Tensor]:
        """``1 - b1^t`` and ``sqrt(1 - b2^t)``, fp32 [parameters]; in fp64 first, where 1 - 0.999 keeps its digits."""
        steps = self.counts.double()
        first = 1 - torch.pow(self.hyper.beta1, steps)
        second = (1 - torch.pow(self.hyper.beta2, steps)).sqrt()
        return first.float(), second.float()


@dataclass(frozen=True)
class Slice:
    """One slice of one parameter with its gradient and states, flat, on one device.

    ``index`` numbers the parameter in ``steps``, ``start`` is the slice's first element in it, ``key`` seeds its random
    bits. ``param`` and ``states`` are updated in place.
    """

    param: Tensor
    grad: Tensor
    states: dict[str, Tensor]
    steps: Steps
    index: int
    start: int
    key: int

    @property
    def is_plain(self) -> bool:
        return self.param.dtype == self.states["exp_avg"].dtype == torch.float32


def update(slices: Sequence[Slice], found_inf: Tensor | None) -> None:
    """Update the slices in place. Where ``found_inf`` (fp32, one element, or None) is not zero, nothing changes."""
    plain: dict[tuple, list[Slice]] = {}
    flags: dict[torch.device, Tensor | None] = {}
    for piece in slices:
        device = piece.param.device
        if device not in flags:
            flags[device] = None if found_inf is None else found_inf.to(device)
        found_inf = flags[device]
        if piece.is_plain:
            plain.setdefault((id(piece.steps), device), []).append(piece)
        elif piece.param.is_cuda:
            # Imported where it runs: lowprec itself needs no Triton.
            import lowprec_kernels.adamw.triton_kernel as triton_kernel

            hyper = piece.steps.hyper
            first, second = piece.steps.corrections
            triton_kernel.run(
                piece.param,
                piece.grad,
                piece.states,
                step=piece.steps.counts[piece.index],
                corrections=(first[piece.index], second[piece.index]),
                lr=hyper.lr,
                beta1=hyper.beta1,
                beta2=hyper.beta2,
                eps=hyper.eps,
                weight_decay=hyper.weight_decay,
                maximize=hyper.maximize,
                start=piece.start,
                key=piece.key,
                found_inf=found_inf,
            )
            torch.autograd.graph.increment_version(piece.param)  # the kernel writes by a raw pointer
        else:
            for start in range(0, piece.param.numel(), SLICE):
                _update_decoded(piece, start, min(start + SLICE, piece.param.numel()), found_inf)
    for (_, device), group in plain.items():
        _fused(
            group[0].steps.hyper,
            [piece.param for piece in group],
            [piece.grad.float() for piece in group],
            [piece.states["exp_avg"] for piece in group],
            [piece.states["exp_avg_sq"] for piece in group],
            [piece.states["max_exp_avg_sq"] for piece in group if "max_exp_avg_sq" in piece.states],
            [piece.steps.counts[piece.index] for piece in group],
            flags[device],
        )


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


def _update_decoded(piece: Slice, start: int, stop: int, found_inf: Tensor | None) -> None:
    """Decode elements ``start .. stop`` of the slice to fp32, update them, encode them back."""
    param = piece.param[start:stop]
    states = {
        name: array[start:stop] if array.numel() == piece.param.numel() else array[_block(start) : _block(stop)]
        for name, array in piece.states.items()
    }
    step = piece.steps.counts[piece.index]
    decoded = reference.decode(param, states)
    p, m, v = (x.clone() for x in decoded[:3])
    v_max = None if decoded[3] is None else decoded[3].clone()
    grad = piece.grad[start:stop].float()
    _fused(piece.steps.hyper, [p], [grad], [m], [v], [] if v_max is None else [v_max], [step], found_inf)
    dtypes = {"param": param.dtype} | {name: array.dtype for name, array in states.items()}
    bits = reference.random_bits(piece.start + start, stop - start, piece.key, step)
    for name, value in reference.encode(p, m, v, v_max, dtypes, bits).items():
        target = param if name == "param" else states[name]
        target.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) == 0, value, target))


def _block(elements: int) -> int:
    return -(-elements // reference.BLOCK)
