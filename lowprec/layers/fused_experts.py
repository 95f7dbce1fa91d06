"""Fused experts of mixture-of-experts models: modules whose weights are 3-D parameters, ``[experts, out, in]``.

transformers lets the product of such a module be chosen by name, in its configuration. A converted module is the
model's own, with its weights as ``FrozenExpertWeights`` and a configuration of its own that names ``NAME``.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lowprec.layers.base import WeightScheme
from lowprec.layers.eight_bit_schemes import EightBit
from lowprec.layers.expert_weights import FrozenExpertWeights
from lowprec.layers.report import BF16
from lowprec.ops.backends import FP8, choose
from lowprec.ops.scaled_grouped_matmul import BACKENDS, MOST_GROUPS, no_grouped_product

NAME = "lowprec_fp8"
"""Of the implementation, in the registry of transformers."""


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds fused expert weights (``weight_names``), with its path: their names say so."""
    for path, module in model.named_modules():
        if any("expert" in f"{path}.{name}".lower() for name in weight_names(module)):
            yield path, module


def weight_names(experts: nn.Module) -> list[str]:
    """The 3-D parameters that a module holds itself."""
    return [name for name, p in experts.named_parameters(recurse=False) if p.ndim == 3]


def why_not(
    experts: nn.Module, scheme: WeightScheme, frozen: bool, device: torch.device | str | None = None
) -> str | None:
    """Why these experts cannot be converted, in words for the report; None where they can.

    Args:
        frozen: whether their weights will never be trained.
        device: where they will be; None: where they are.
    """
    if isinstance(experts, FrozenExpertWeights):
        return "they are in 8 bits already"
    if scheme.option_name == BF16:
        return "16 bits were asked for"
    weights = [experts.get_parameter(name) for name in weight_names(experts)]
    if not all(_has_grouped_product(scheme, weight) for weight in weights):
        return (
            f"of 8-bit products only fp8's, unrotated with row scales, are grouped, not those of {scheme.option_name}"
        )
    if not frozen:
        return "they are trained: no grouped 8-bit product gives gradients of weights"
    place = weights[0].device if device is None else torch.device(device)
    reasons = [_why_not_module(experts), *map(_why_not_weight, weights)]
    if place.type == "cuda":
        reasons.append(no_grouped_product(place))
    return next(filter(None, reasons), None)


def _has_grouped_product(scheme: WeightScheme, weight: torch.Tensor) -> bool:
    if not isinstance(scheme, EightBit):
        return False
    plan = scheme.plan(weight.shape[2], weight.shape[1])
    unrotated = plan.in_block == plan.error_token_block == 1
    return plan.dtype == FP8 and unrotated and plan.scale == "row" and plan.shares_weight


def _why_not_module(experts: nn.Module) -> str | None:
    kind = type(experts).__name__
    if not hasattr(experts, "is_transposed"):  # set by transformers' use_experts_implementation
        return f"{kind} does not let its product be chosen (transformers' use_experts_implementation)"
    for attribute, meaning in (
        ("is_transposed", "stores its weights as [experts, in, out]"),
        ("has_bias", "has biases"),
        ("has_post_expert_norm", "has a norm behind each expert"),
        ("_is_expert_parallel", "is spread over processes"),
    ):
        if getattr(experts, attribute, False):
            return f"{kind} {meaning}"
    expected = {_up_name(experts), "down_proj"}
    if set(weight_names(experts)) != expected:
        return f"{kind} holds {', '.join(weight_names(experts))}, not {' and '.join(sorted(expected))}"
    return None


def _why_not_weight(weight: torch.Tensor) -> str | None:
    experts, out, into = weight.shape
    if out % 16 or into % 16:
        return f"8-bit products need multiples of 16, each is {out} x {into}"
    if experts > MOST_GROUPS:
        return f"the grouped product takes at most {MOST_GROUPS} experts, there are {experts}"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"their weights are {weight.dtype}"
    return "their weights are not loaded (meta device)" if weight.device.type == "meta" else None


def convert(experts: nn.Module, scheme: WeightScheme, device: torch.device | str | None, origin: str) -> None:
    """Store the weights of ``experts``, for which ``why_not`` has no reason, as codes on ``device`` (None: where they
    are), and have them multiplied by ``forward``. Each 16-bit weight is freed before the next is read."""
    assert isinstance(scheme, EightBit)
    for name in weight_names(experts):
        weight = experts.get_parameter(name).to(device)
        delattr(experts, name)
        codes = FrozenExpertWeights(weight, scheme.layout, scheme.fast_accumulation, scheme.fast_gradients, origin)
        experts.add_module(name + FrozenExpertWeights.SUFFIX, codes)
        del weight
    experts.register_load_state_dict_pre_hook(_hand_to_codes)
    experts.config = copy.deepcopy(experts.config)
    experts.config._experts_implementation = NAME  # type: ignore[union-attr]


def kernel(experts: nn.Module) -> str:
    """The backend of the forward product of converted experts."""
    codes, scale = getattr(experts, _up_name(experts) + FrozenExpertWeights.SUFFIX)._codes()
    a, ones, ends = codes[0, :16], scale[0, :16], torch.empty(codes.shape[0], dtype=torch.int32, device=codes.device)
    return f"{choose(BACKENDS, a, ones, codes, scale, ends, torch.bfloat16, True).name}, float8_e4m3fn"


def _up_name(experts: nn.Module) -> str:
    """Of the first projection: gate and up in one where there is a gate."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _hand_to_codes(experts: nn.Module, state: dict, prefix: str, *rest: object) -> None:
    """Rename the weights of a state dict to where their codes are."""
    for child, module in experts.named_children():
        if isinstance(module, FrozenExpertWeights):
            name = prefix + child.removesuffix(FrozenExpertWeights.SUFFIX)
            if name in state:
                state[f"{prefix}{child}.weight"] = state.pop(name)


def forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What the experts that the router chose make of each token, weighted and summed. Nothing waits for the host.

    Args:
        experts: a converted module.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: ``[tokens, k]``, the experts of each token.
        top_k_weights: ``[tokens, k]``.

    Returns:
        ``[tokens, hidden]`` in the dtype of ``hidden_states``.
    """
    tokens, k = top_k_index.shape
    up = getattr(experts, _up_name(experts) + FrozenExpertWeights.SUFFIX)
    down = getattr(experts, "down_proj" + FrozenExpertWeights.SUFFIX)
    chosen, order = top_k_index.reshape(-1).sort()
    numbers = torch.arange(up.shape[0], device=chosen.device)
    offsets = torch.searchsorted(chosen, numbers, right=True, out_int32=True)  # [experts]: where the rows of each end
    x = up(hidden_states[order // k], offsets)
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)  # type: ignore[operator]
    x = down(x, offsets) * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(tokens * k, device=order.device)
    return x[back].view(tokens, k, x.shape[1]).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
