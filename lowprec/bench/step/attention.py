"""Causal attention, forward and backward, bf16: lowprec's, and PyTorch's by each of its kernels or sample by sample."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowprec.attention import attention
from lowprec.bench.step.call import Call
from lowprec.data.documents import Documents

CASES = ((2, 32, 8, 2048, 128), (4, 32, 8, 2048, 64), (1, 32, 8, 16384, 128))
"""Rows, heads, key heads, tokens, dimension: Llama-3-8B, Llama-3.2-1B, one long row."""
PACKED_CASES = ((2, 32, 8, 2048, 128, 256),)
"""The same, and the tokens of each sample that the rows are made of."""
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
NOTE = (
    "attention: the name is that of the longest kernel in a call. TFLOP/s: of half the causal square, two products "
    "forward and five backward, where scores are computed again"
)

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From query, key and value ``[rows, heads, tokens, dim]`` to ``[rows, tokens, heads, dim]``."""


def calls(rows: int, heads: int, key_heads: int, tokens: int, dim: int, device: torch.device) -> Iterator[Call | str]:
    shape = f"{rows} x {tokens} tokens, {heads} + {key_heads} heads of {dim}"
    operands = _operands(rows, heads, key_heads, tokens, dim, device)
    step = partial(Call, shape, flops=_flops(rows, heads, tokens, dim), names_kernel=True)
    yield NOTE
    yield step("lowprec", partial(_gradients, _ours(heads // key_heads), *operands))
    for backend in BACKENDS:
        run = partial(_gradients, partial(_forced, backend), *operands)
        reason = refusal(run)
        yield step(f"SDPA, {backend.name}", run) if reason is None else f"{shape}: no {backend.name}: {reason}"


def packed_calls(
    rows: int, heads: int, key_heads: int, tokens: int, dim: int, sample: int, device: torch.device
) -> Iterator[Call | str]:
    count = rows * tokens // sample
    documents = Documents.of([sample] * count).to(device)
    operands = _operands(rows, heads, key_heads, tokens, dim, device)
    shape = f"{rows} x {tokens} tokens in samples of {sample}, {heads} + {key_heads} heads of {dim}"
    step = partial(Call, shape, flops=_flops(count, heads, sample, dim), names_kernel=True)
    yield NOTE
    yield step("lowprec", partial(_gradients, _ours(heads // key_heads, documents), *operands))
    yield step("SDPA, sample by sample", partial(_gradients, partial(_one_by_one, sample), *operands))


def refusal(run: Callable[[], object]) -> str | None:
    """Why PyTorch does not run a call by the backend that it is told to take, which it says in warnings; or None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except RuntimeError as error:
            told = [str(warning.message).split(" (Triggered")[0] for warning in caught]
            # It tells of all backends, and that the others are off.
            reasons = [text for text in told if "not used because" not in text and "runtime disabled" not in text]
            return "; ".join(dict.fromkeys(reasons)) or str(error).splitlines()[0]
    return None


def _gradients(way: Way, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, error: torch.Tensor) -> object:
    return torch.autograd.grad(way(q, k, v), (q, k, v), error)


def _ours(groups: int, documents: Documents | None = None) -> Way:
    module: Any = torch.nn.Module()
    module.num_key_value_groups = groups
    return lambda q, k, v: attention(module, q, k, v, None, documents=documents)[0]


def _forced(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return _sdpa(q, k, v)


def _one_by_one(sample: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    split = [[part for row in t.split(1) for part in row.split(sample, dim=2)] for t in (q, k, v)]
    samples = [_sdpa(*parts) for parts in zip(*split, strict=True)]
    return torch.cat(samples, dim=1).view(q.transpose(1, 2).shape)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1).transpose(1, 2)


def _operands(
    rows: int, heads: int, key_heads: int, tokens: int, dim: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Query, key and value, which lie as models make them, token by token, and the gradient of the result."""
    made = [
        torch.randn(rows, tokens, count, dim, dtype=torch.bfloat16, device=device)
        for count in (heads, key_heads, key_heads, heads)
    ]
    return (*(t.transpose(1, 2).requires_grad_() for t in made[:3]), made[3])


def _flops(samples: int, heads: int, tokens: int, dim: int) -> int:
    """Seven products of half of ``tokens`` x ``tokens`` x ``dim`` multiplications and additions each."""
    return 7 * samples * heads * tokens**2 * dim
