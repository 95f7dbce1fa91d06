"""Checks of AdamW's arguments, each with its remedy, and the numbering of its parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowprec.errors import UserError


def check_hyper(group: dict) -> None:
    """The ranges that ``torch.optim.AdamW`` demands of a parameter group."""
    lr, betas, eps, weight_decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise UserError(f"lr as a tensor must have one element, not the shape {tuple(lr.shape)}.")
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise UserError(f"lr={lr} is invalid: it must be at least 0.")
    if len(betas) != 2 or any(isinstance(beta, Tensor) or not 0 <= beta < 1 for beta in betas):
        raise UserError(f"betas={betas} is invalid: give two numbers, each at least 0 and below 1.")
    if not eps >= 0:
        raise UserError(f"eps={eps} is invalid: it must be at least 0.")
    if not weight_decay >= 0:
        raise UserError(f"weight_decay={weight_decay} is invalid: it must be at least 0.")


def check_modes(
    state_store: str, foreach: bool | None, capturable: bool, differentiable: bool, fused: bool | None
) -> None:
    """Refuse the arguments of ``torch.optim.AdamW`` that would be without effect here."""
    if foreach:
        raise UserError("foreach=True cannot be honoured: lowprec.AdamW updates by a fused kernel. Leave foreach out.")
    if fused is False:
        raise UserError(
            "fused=False cannot be honoured: lowprec.AdamW always updates by a fused kernel. Leave fused out."
        )
    if differentiable:
        raise UserError(
            "differentiable=True cannot be honoured: the fused update keeps no graph. Use torch.optim.AdamW for it."
        )
    if capturable and state_store != "gpu":
        raise UserError(
            f"capturable=True cannot be honoured with state_store={state_store!r}, whose transfers no CUDA graph "
            "holds: use state_store='gpu'."
        )


def number(groups: Sequence[dict]) -> tuple[list[str], list[Tensor], list[int]]:
    """Names, parameters and group numbers, in the order in which torch's state dicts number the parameters."""
    names: list[str] = []
    params: list[Tensor] = []
    group_of: list[int] = []
    for index, group in enumerate(groups):
        given = group.get("param_names") or [f"param_{len(params) + i}" for i in range(len(group["params"]))]
        names += given
        params += group["params"]
        group_of += [index] * len(given)
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise UserError(
            f"Two parameters are called {repeated[0]}: the states are keyed by name. Pass all groups from one "
            "model.named_parameters()."
        )
    return names, params, group_of


def check_param(name: str, param: Tensor) -> None:
    """A parameter must be one dense run of memory, which slices and chunks are cut from."""
    if param.layout != torch.strided or not param.is_contiguous():
        raise UserError(
            f"Parameter {name} (shape {tuple(param.shape)}, strides "
            f"{param.stride() if param.layout == torch.strided else None}) "
            "is not contiguous: make it so (param.data = param.data.contiguous()) before building the optimizer."
        )
