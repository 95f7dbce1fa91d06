"""The head with its loss, forward and backward, bf16: lowprec's chunks at several sizes, Liger's fused function, and
all logits at once."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional as F

from lowprec.bench.step.call import Call, liger_functions
from lowprec.fused.linear_cross_entropy import linear_cross_entropy, rows_of_chunk

CASES = ((4096, 4096, 128256, False), (8192, 2048, 128256, True), (2048, 1536, 151936, True), (2048, 576, 49152, True))
"""Tokens, width, vocabulary, whether the head trains: Llama-3-8B QLoRA, Llama-3.2-1B, Qwen2.5-1.5B, SmolLM2-135M."""

_MEBI = 2**20


def calls(tokens: int, width: int, classes: int, trained: bool, device: torch.device) -> Iterator[Call]:
    liger_function = liger_functions().LigerFusedLinearCrossEntropyFunction
    hidden, weight = (
        torch.randn(rows, width, device=device, dtype=torch.bfloat16).mul_(0.05) for rows in (tokens, classes)
    )
    targets = torch.randint(0, classes, (tokens,), device=device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()] if trained else [hidden.requires_grad_()]

    def plain() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    def liger() -> torch.Tensor:
        return liger_function.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]

    chosen = rows_of_chunk(classes, 2, trained)
    ways: dict[str, Callable[[], torch.Tensor]] = {"all logits": plain, "Liger": liger}
    for mebi in (64, 128, 256, 512, 1024):
        size = max(128, mebi * _MEBI // (2 * classes) // 128 * 128)
        mark = " (the choice)" if size == chosen else ""
        ways[f"chunks of {size}{mark}"] = partial(linear_cross_entropy, hidden, weight, targets, chunk_rows=size)

    def gradients(loss: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(loss() * 1e-3, leaves)

    shape = f"{tokens} x {width} x {classes}, {'trained' if trained else 'frozen'}"
    for way, loss in ways.items():
        yield Call(shape, way, partial(gradients, loss), replayed=False)
