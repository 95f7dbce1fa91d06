"""The frozen layers that LoRA can be fused with, and their two products as plain functions of tensors."""

import torch
from lowprec_kernels.scaled_matmul.reference import add_low_rank
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lowprec.layers.eight_bit import SharedInput
from lowprec.ops.scaled_matmul import fuses


def _own_products(base: nn.Module) -> bool:
    """Whether the layer brings ``base_product`` and ``base_gradient``: those of ``weights=nf4`` and the 8-bit ones."""
    return hasattr(base, "base_product")


def why_not(base: nn.Module) -> str | None:
    """Why LoRA on this base takes PEFT's path; None where it can be fused."""
    if _own_products(base):
        return None
    if type(base) not in (nn.Linear, Conv1D):
        return f"its base is a {type(base).__name__}"
    if base.weight.requires_grad:
        return "its base weight is trained"
    if not isinstance(base.weight, torch.Tensor) or not base.weight.is_floating_point():
        return f"its base weight is {base.weight.dtype}"
    return None


def product(
    base: nn.Module, inputs: SharedInput, bias: torch.Tensor | None, low: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """Y = X W^T + b + L B^T: ``[tokens, out]`` in the dtype of X, of ``low [tokens, r]`` in the same dtype and ``up
    [out, r]``."""
    if _own_products(base):
        return base.base_product(inputs, bias, low, up)  # type: ignore[operator]
    x = inputs.x
    return add_low_rank(F.linear(x, _weight(base, x.dtype), None if bias is None else bias.to(x.dtype)), low, up)


def casts_up(base: nn.Module, rank: int, x: torch.Tensor) -> bool:
    """Whether the base's product reads B in any dtype. (bitsandbytes' kernel for a few tokens casts it.)"""
    return _own_products(base) and base.plan is not None and fuses(rank, x.dtype, x.device)


def add_gradient(base: nn.Module, error: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    """``total`` (None: nothing yet) plus E W, ``[tokens, in]``, in place where there is a total."""
    if _own_products(base):
        gradient = base.base_gradient(error)  # type: ignore[operator]
        return gradient if total is None else total.add_(gradient)
    weight = _weight(base, error.dtype)
    return error @ weight if total is None else total.addmm_(error, weight)


def _weight(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """``[out, in]``; transformers' ``Conv1D`` stores it transposed."""
    weight: torch.Tensor = base.weight.to(dtype)  # type: ignore[operator,assignment]
    return weight.t() if isinstance(base, Conv1D) else weight


def returns_input_dtype(base: nn.Module) -> bool:
    """Whether the layer gives back the dtype that came in, also under autocast: those of bitsandbytes' family do."""
    return bool(getattr(base, "returns_input_dtype", False))
