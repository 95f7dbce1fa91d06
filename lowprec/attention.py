"""Causal attention that asks the device nothing and holds no mask.

Before every forward pass transformers reads back from the device whether a batch has padding or packed rows, to decide
whether it needs a mask; the host waits there until all earlier work is done. A batch padded on the right needs none: no
token sees what comes after it, and the padding's own results carry no label. A packed batch needs none either: the
lengths of its samples are known on the host and come with it (:class:`lowprec.data.documents.Documents`), and each
sample is attended to by itself. On GPUs PyTorch's FlashAttention takes samples of many lengths in one call; elsewhere
they are taken one by one.

Transformers builds no mask for attention functions that have no mask function, so registering ours under a name of its
own leaves the batches alone.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowprec.data.documents import Documents, power_of_two

CAUSAL_SDPA = "lowprec_causal_sdpa"
LONG_ROW = 4096
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
"""Keys of configurations that bound how many tokens a token sees."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' interface: query ``[rows, heads, tokens, dim]``, key and value with as many heads or a divisor of
    them, result ``[rows, tokens, heads, dim]``.

    Args:
        documents: of a packed batch; without them a row is one sample.
        sliding_window: tokens that one sees, itself included; None for all before it.

    Raises:
        ValueError: the architecture wants more of attention than this: soft caps, biases, sinks.
    """
    rows, heads, tokens, dim = query.shape
    flash = why_no_flash(query, dropout) is None
    longest = tokens
    if documents is not None:  # FlashAttention is told a power of two, as graphs tell it: the same kernels in both
        longest = power_of_two(documents.longest) if flash else documents.longest
    hides = sliding_window is not None and sliding_window < longest and key.shape[2] == tokens
    if attention_mask is not None or (documents is None and not hides):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    unknown = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"{CAUSAL_SDPA} knows no {unknown[0]}")
    window = sliding_window if hides else None
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:  # as autocast does for SDPA
        query, key, value = (t.to(torch.get_autocast_dtype(kind)) for t in (query, key, value))
    parts = [t.transpose(1, 2) for t in (query, key, value)]
    if documents is not None:
        parts = [t.reshape(rows * tokens, t.shape[2], dim) for t in parts]
    if flash:
        borders = documents.borders if documents is not None else None
        out = torch.ops.aten._flash_attention_forward(
            *parts, borders, borders, longest, longest, 0.0, True, False,
            scale=scaling, window_size_left=-1 if window is None else window - 1, window_size_right=0,
        )[0]  # fmt: skip
        return out.view(rows, tokens, heads, dim), None
    if documents is not None and not documents.lengths:
        raise ValueError(
            f"{CAUSAL_SDPA} takes rounded documents only by FlashAttention: {why_no_flash(query, dropout)}"
        )
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != heads}
    if documents is None:
        return _one_sample(query, key, value, window, options).transpose(1, 2), None
    split = [t.transpose(0, 1)[None].split(documents.lengths, dim=2) for t in parts]
    samples = [_one_sample(q, k, v, window, options) for q, k, v in zip(*split, strict=True)]
    out = torch.cat(samples, dim=2)[0].transpose(0, 1)
    return out.reshape(rows, tokens, heads, dim), None


def _one_sample(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, options: dict[str, Any]
) -> torch.Tensor:
    """Causal attention of samples of one length, ``[samples, heads, tokens, dim]``. With a window, a block of as many
    queries at a time sees at most twice as many keys: no mask is longer than that."""
    tokens = q.shape[2]
    if window is None or tokens <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    blocks = []
    for start in range(0, tokens, window):
        first, end = max(0, start - window + 1), min(start + window, tokens)
        distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        seen = (distance >= 0) & (distance < window)
        part = (q[:, :, start:end], k[:, :, first:end], v[:, :, first:end])
        blocks.append(F.scaled_dot_product_attention(*part, attn_mask=seen, **options))
    return torch.cat(blocks, dim=2)


def why_no_flash(query: torch.Tensor, dropout: float = 0.0) -> str | None:
    """Why PyTorch's FlashAttention cannot take samples of many lengths at once; None where it can."""
    if not query.is_cuda:
        return "it runs on CUDA devices"
    if dropout:
        return "the model drops attention weights"
    return why_no_flash_of(query.shape[-1], query.dtype, torch.cuda.get_device_capability(query.device))


def why_no_flash_of(dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """The same of heads of ``dim`` on a card that need not be here."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not in {dtype}"
    if dim % 8 or dim > 256:
        return f"heads of {dim} are not a multiple of 8 up to 256"
    if capability < (8, 0):
        return "it needs compute capability 8.0"
    return None


def head_dim(config: Any) -> int:
    """The width of the heads of a model with this text configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


ALL_ATTENTION_FUNCTIONS.register(CAUSAL_SDPA, attention)


def mask_note(model: PreTrainedModel, max_length: int) -> str | None:
    """What long rows cost a model whose masks are built whole; None where they are short or there are none."""
    config = model.config
    if max_length <= LONG_ROW or config._attn_implementation not in ("sdpa", "eager"):
        return None
    windows = [getattr(config, name, None) for name in WINDOWS]
    window = min((w for w in windows if isinstance(w, int)), default=None)
    remedy = f" Samples of up to {window} tokens, generated ones included, need none." if window else ""
    return (
        f"the attention of {type(model).__name__} is given a mask of {max_length} x {max_length} for each row of "
        f"data.max_length={max_length}, {max_length**2 / 2**20:.0f} MiB.{remedy}"
    )


def attend_without_masks(model: PreTrainedModel, longest: int | None = None) -> bool:
    """Let a model with causal SDPA build no masks. Batches must be padded on the right, or not at all, or come with
    ``documents``.

    Args:
        longest: tokens of the longest sample that the model will see. A chunk of at least that many hides nothing, and
            then needs no mask.

    Returns:
        Whether it was done. Models with shorter chunks or with prefixes that see both ways keep their masks, as do
        other attention implementations.
    """
    config = model.config
    if config._attn_implementation != "sdpa" or not getattr(config, "is_causal", True):
        return False
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layer_types <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return False
    slides = getattr(config, "sliding_window", None) is not None or "sliding_attention" in layer_types
    # Architectures that can use FlashAttention, which takes no masks either, tell each layer's attention its window.
    told = model._supports_flash_attn and isinstance(getattr(config, "sliding_window", None), int)
    others = [getattr(config, name, None) for name in WINDOWS if not (told and name == "sliding_window")]
    if slides and not told and not any(others):
        return False
    if any(others) or "chunked_attention" in layer_types:
        known = [window for window in others if window]
        if longest is None or not known or not all(isinstance(w, int) and w >= longest for w in known):
            return False
    try:
        model.set_attn_implementation(CAUSAL_SDPA)
    except (ValueError, ImportError):  # an architecture whose attention is not behind transformers' interface
        return False
    return True
