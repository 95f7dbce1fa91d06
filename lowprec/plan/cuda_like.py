"""Stand-ins for CUDA on a machine without it: the choices that PyTorch would make for a GPU where it makes others for a
processor.

Tensors without data cannot be on ``cuda`` in a build without CUDA (autograd asks the device's driver for a stream), so
they are on ``cpu``. Operators are the same on both but for those that ``LikeCuda`` replaces.
"""

from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

FLASH_CAPABILITY = (8, 0)
FLASH_HEAD = 256


class LikeCuda(TorchFunctionMode):
    """Replaces what a GPU of ``capability`` would compute otherwise than a processor: fused attention, dropout with a
    mask of bytes, and the functions that autocast runs in fp32 on CUDA alone."""

    def __init__(self, capability: tuple[int, int]):
        super().__init__()
        self._capability = capability

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            # A mode is off while it handles a call, and backward may recompute: hence the engine's own entrance.
            with self:
                first = torch.ones_like(args[0])
                return _engine_run_backward(
                    args, (first,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func in _FP32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(_wide(value) for value in args)
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As ``sdp_utils.cpp`` chooses: flash attention for 16 bits without a mask, else the memory-efficient one."""
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        width = query.shape[-1]
        narrow = attn_mask is None and query.element_size() == 2 and width <= FLASH_HEAD
        if narrow and self._capability >= FLASH_CAPABILITY:
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if enable_gqa and key.shape[1] != query.shape[1]:  # only the plain products know grouped heads then
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
            scores = query @ key.transpose(-1, -2) * (scale or width**-0.5)
            return torch.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ value
        bias = attn_mask
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
        if bias is not None:
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]


def _flash(query, key, value, dropout_p, is_causal, scale) -> torch.Tensor:
    """The kernel takes heads whose width is a multiple of 8; others are filled up (``pad_last_dim``)."""
    width = query.shape[-1]
    missing = -width % 8
    if missing:
        query, key, value = (F.pad(tensor, (0, missing)) for tensor in (query, key, value))
        scale = scale or width**-0.5
    out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return out[..., :width] if missing else out


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training or p == 0 or inplace:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


_FP32_ON_CUDA = {
    F.layer_norm,
    torch.layer_norm,
    F.group_norm,
    F.softmax,
    torch.softmax,
    F.log_softmax,
    torch.log_softmax,
    torch.norm,
    torch.rsqrt,
    torch.exp,
    torch.log,
    torch.pow,
    torch.Tensor.softmax,
    torch.Tensor.log_softmax,
    torch.Tensor.norm,
    torch.Tensor.rsqrt,
    torch.Tensor.exp,
    torch.Tensor.log,
    torch.Tensor.pow,
}
"""Of the list in PyTorch's documentation of autocast ("CUDA Ops that can autocast to float32"), those that language
models call and that autocast leaves alone on a processor."""


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value
