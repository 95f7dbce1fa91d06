"""Causal attention that asks the device nothing.

Before every forward pass transformers reads back from the device whether a batch has padding or packed rows, to decide
whether it needs a mask; the host waits there until all earlier work is done. A batch padded on the right needs none: no
token sees what comes after it, and the padding's own results carry no label. Transformers builds no mask for attention
functions that have no mask function, so registering SDPA under a name of its own leaves the causal kernel alone.
"""

from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CAUSAL_SDPA = "lowprec_causal_sdpa"

ALL_ATTENTION_FUNCTIONS.register(CAUSAL_SDPA, sdpa_attention_forward)


def attend_without_masks(model: PreTrainedModel) -> bool:
    """Let a model with plain causal SDPA build no masks. Batches must be padded on the right, or not at all.

    Returns:
        Whether it was done. Models with sliding windows, chunks or prefixes that see both ways keep their masks, as do
        other attention implementations.
    """
    config = model.config
    if config._attn_implementation != "sdpa" or not getattr(config, "is_causal", True):
        return False
    windowed = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if windowed or layer_types != {"full_attention"}:
        return False
    try:
        model.set_attn_implementation(CAUSAL_SDPA)
    except (ValueError, ImportError):  # an architecture whose attention is not behind transformers' interface
        return False
    return True
