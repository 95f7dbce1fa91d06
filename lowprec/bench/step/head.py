"""``python -m lowprec.bench.step``: the pieces of a step beside what they replace, forward and backward, on a GPU.

The head with its loss: lowprec's chunks at several sizes, Liger's fused function, and all logits at once. Norm, gated
product and rotary embedding: Liger's kernels and PyTorch's operations.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

from lowprec.bench.measure import BenchResult, need_gpu
from lowprec.fused import mlp, norm, rope
from lowprec.fused.linear_cross_entropy import linear_cross_entropy, rows_of_chunk
from lowprec.machine.timing import milliseconds

HEADS = ((4096, 4096, 128256, False), (8192, 2048, 128256, True), (2048, 1536, 151936, True), (2048, 576, 49152, True))
"""Tokens, width, vocabulary, whether the head trains: Llama-3-8B QLoRA, Llama-3.2-1B, Qwen2.5-1.5B, SmolLM2-135M."""

WIDTHS = ((4096, 4096, 14336, 32, 8), (8192, 2048, 8192, 32, 8))
"""Tokens, width, inner width, heads and key heads of dimension 128 or 64."""

_MEBI = 2**20


def run(heads: tuple = HEADS, widths: tuple = WIDTHS) -> BenchResult:
    """A row each of time and peak memory, bf16.

    Raises:
        UserError: there is no GPU.
    """
    need_gpu("step")
    rows = []
    for case in heads:
        rows += [_row(*entry) for entry in _heads(*case)]
    for case in widths:
        rows += [_row(*entry) for entry in _parts(*case)]
    return BenchResult("Pieces of a step, forward and backward", rows, ["GiB: peak beyond what stands before"])


def _row(piece: str, shape: str, way: str, call: Callable[[], object]) -> dict[str, Any]:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"piece": piece, "shape": shape, "way": way, "ms": milliseconds(call), "GiB": peak / 2**30}


def _heads(tokens: int, width: int, classes: int, trained: bool) -> Iterator[tuple]:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    hidden = _random(tokens, width)
    weight = _random(classes, width).requires_grad_(trained)
    targets = torch.randint(0, classes, (tokens,), device="cuda")
    leaves = [hidden, weight] if trained else [hidden]

    def plain() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    def liger() -> torch.Tensor:
        arguments = (hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")
        return LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0]

    chosen = rows_of_chunk(classes, 2, trained)
    ways: dict[str, Callable[[], torch.Tensor]] = {"all logits": plain, "Liger": liger}
    for mebi in (64, 128, 256, 512, 1024):
        size = max(128, mebi * _MEBI // (2 * classes) // 128 * 128)
        mark = " (the choice)" if size == chosen else ""
        ways[f"chunks of {size}{mark}"] = partial(linear_cross_entropy, hidden, weight, targets, chunk_rows=size)
    shape = f"{tokens} x {width} x {classes}, {'trained' if trained else 'frozen'}"
    for way, function in ways.items():
        yield "head and loss", shape, way, lambda function=function: torch.autograd.grad(function() * 1e-3, leaves)


def _parts(tokens: int, width: int, inner: int, heads: int, key_heads: int) -> Iterator[tuple]:
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    x, weight = _random(tokens, width), torch.ones(width, device="cuda", dtype=torch.bfloat16)
    variant = norm.Variant(0.0, "llama", 1e-6)
    norms = {
        "PyTorch": lambda: norm.plain_norm(x, weight, variant),
        "Liger": lambda: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False, None),
    }
    gate, up = _random(tokens, inner), _random(tokens, inner)
    products = {
        "PyTorch": lambda: mlp.PLAIN["SwiGLU"](gate, up),
        # Its backward overwrites what it was given.
        "Liger": lambda: LigerSiLUMulFunction.apply(gate.clone(), up.clone()),
        "two clones, which Liger's row has besides": lambda: gate.clone() + up.clone(),
    }
    dim = width // heads
    q, k = (_random(1, tokens, count, dim).detach().transpose(1, 2).requires_grad_() for count in (heads, key_heads))
    angles = torch.randn(1, tokens, dim // 2, device="cuda").repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    ropes = {
        "PyTorch": lambda: torch.cat(rope.plain_rope(q, k, cos, sin), 1),
        "Liger": lambda: torch.cat(LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin), 1),
    }
    for piece, shape, ways, leaves in (
        ("RMSNorm", f"{tokens} x {width}", norms, [x]),
        ("SwiGLU", f"{tokens} x {inner}", products, [gate, up]),
        ("RoPE", f"{tokens} x {heads} + {key_heads} heads of {dim}", ropes, [q, k]),
    ):
        for way, function in ways.items():
            error = torch.randn_like(function())
            yield piece, shape, way, lambda f=function, e=error, over=leaves: torch.autograd.grad(f(), over, e)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(0.05).requires_grad_()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lowprec.bench.step", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    result = run()
    Console(width=140).print(result)
    if options.json:
        result.write_json(options.json)


if __name__ == "__main__":
    main()
