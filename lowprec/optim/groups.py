"""Which parameters an optimizer of a recipe updates, by name, and which of them decay."""

from typing import Any

from torch import nn

from lowprec.errors import UserError

# Left without weight decay, as in transformers' Trainer.get_decay_parameter_names: biases and norms, by class or name.
_NOT_DECAYED = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of named parameters that require a gradient: with ``weight_decay``, and biases and norms with none.

    An empty group is left out. Raises UserError where nothing trains.
    """
    from transformers.trainer_pt_utils import get_parameter_names  # imported here: it brings the whole Trainer

    decayed = set(get_parameter_names(model, [nn.LayerNorm, nn.RMSNorm], list(_NOT_DECAYED)))
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise UserError(
            "No parameter of the model requires a gradient: choose adapter=lora, or weights that can be trained."
        )
    groups = [
        {"params": [item for item in named if item[0] in decayed], "weight_decay": weight_decay},
        {"params": [item for item in named if item[0] not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
