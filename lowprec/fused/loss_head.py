"""The loss inside the model's ``forward``, so that the logits never leave it: whoever wraps the model (DDP, PEFT,
Accelerate) sees a scalar.

With ``trained_positions`` the instance's ``forward`` runs the model's decoder, takes the hidden states that have a
label, and returns the summed cross-entropy, chunk by chunk. Without them it is the class's own ``forward``: generation
and other callers notice nothing.
"""

from functools import wraps
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lowprec.data.collate import shifted
from lowprec.fused.linear_cross_entropy import head_cross_entropy, linear_cross_entropy
from lowprec.fused.stand_in import random_linear, replace_forward, stand_in

_MARK = "_lowprec_loss"


def gives_loss(model: nn.Module) -> bool:
    """Whether ``forward`` takes ``trained_positions``, also through the wrappers of DDP and PEFT."""
    return getattr(getattr(model, "module", model), _MARK, False)


def put_loss(model: PreTrainedModel) -> str | None:
    """Let this one model give its summed loss from ``forward(..., labels=..., trained_positions=...)``.

    Returns:
        Why it was left alone; None where it was done.
    """
    if gives_loss(model):
        return None
    with unset_fake_temporarily():  # lowprec.plan puts the loss on models without data; the trial needs numbers
        tail = _tail(model)
    if isinstance(tail, str):
        return tail
    scale, softcap = tail
    own = type(model).forward

    @wraps(own)  # generation reads the signature
    def forward(self: Any, *args: Any, trained_positions: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if trained_positions is None:
            return own(self, *args, **kwargs)
        labels = kwargs.pop("labels")
        hidden = self.base_model(*args, **kwargs)[0]
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, trained_positions)
        targets = shifted(labels).index_select(0, trained_positions)
        return CausalLMOutputWithPast(loss=_loss(self.get_output_embeddings(), hidden, targets, scale, softcap))

    replace_forward(model, forward)
    setattr(model, _MARK, True)
    return None


def _loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    hooked = head._forward_hooks or head._forward_pre_hooks
    if type(head) is nn.Linear and not hooked and "forward" not in vars(head):
        return linear_cross_entropy(hidden, head.weight, targets, head.bias, scale=scale, softcap=softcap)
    return head_cross_entropy(head, hidden, targets, scale=scale, softcap=softcap)


class _Decoder(nn.Module):
    """Gives hidden states that are known, whatever it is asked."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> nn.Module:  # OPT asks one level deeper
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _HiddenStates(last_hidden_state=self.hidden)  # type: ignore[arg-type]


class _HiddenStates(BaseModelOutputWithPast):
    """Has None for whatever else decoders return: router logits, caches."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _tail(model: PreTrainedModel) -> tuple[float, float] | str:
    """What the model does to its logits after the head, as (scale, softcap), found by trying it on hidden states that
    are known; or why that is not to be had."""
    head, prefix = model.get_output_embeddings(), model.base_model_prefix
    head_name = next((name for name, module in model._modules.items() if module is head and head is not None), None)
    if head_name is None or prefix not in model._modules:
        return "its output head is not where causal language models have it"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, 8, generator=generator, device="cpu")
    small = random_linear(16, 8, generator)
    children: dict[str, nn.Module] = {prefix: _Decoder(hidden), head_name: small}
    try:
        with torch.no_grad():
            found = stand_in(model, children)(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False).logits
    except Exception as error:  # whatever a model's forward may raise
        return f"a trial of its head failed ({type(error).__name__}: {str(error)[:80]})"
    logits, config = small(hidden), model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None) or 0.0
    for scale in (1.0, getattr(config, "logit_scale", None), 1 / (getattr(config, "logits_scaling", None) or 1)):
        for softcap in (0.0, cap):
            expected = logits * (scale or 1.0)
            expected = softcap * torch.tanh(expected / softcap) if softcap else expected
            if found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-5, atol=1e-5):
                return scale or 1.0, softcap
    return "its logits are changed after the head in a way that is not known here"
