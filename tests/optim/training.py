"""A small training run that every test of the optimizer drives: 20 k parameters, fixed data, any dtype and store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowprec.optim import AdamW


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Sizes that are no multiples of 256, so that blocks, chunks and parameters end in different places."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(37, 190), nn.GELU(), nn.Linear(190, 67), nn.LayerNorm(67), nn.Linear(67, 5))
    return model.to(dtype)


def backward(model: nn.Module, step: int) -> float:
    """Gradients of step ``step``, which depend on the weights and on nothing else."""
    param = next(model.parameters())
    x = torch.randn(8, 37, generator=torch.Generator().manual_seed(step)).to(param)
    loss = model(x).float().square().mean()
    loss.backward()
    return loss.item()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stop: int,
    start: int = 0,
    after_step: Callable[[int], Any] = lambda step: None,
) -> list[torch.Tensor]:
    """Steps ``start`` to ``stop``; returns copies of the weights."""
    for step in range(start, stop):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        after_step(step)
    return [param.detach().clone() for param in model.parameters()]


def run(stop: int = 10, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[torch.Tensor], AdamW]:
    model = make_model(dtype)
    optimizer = AdamW(model.named_parameters(), lr=1e-2, **options)
    return train(model, optimizer, stop), optimizer


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SMALL = {"chunk_bytes": 20_000, "pinned_gib": 0.0005}


def ssd(path, **options):
    return {"state_store": "ssd", "path": path, **SMALL, **options}


def start(path, dtype=torch.bfloat16, steps=4, **options):
    model = make_model(dtype)
    optimizer = AdamW(model.named_parameters(), lr=1e-2, **ssd(path, **options))
    train(model, optimizer, steps)
    return model, optimizer


def stores(tmp_path: Path) -> list[dict[str, Any]]:
    """Options of every store but the GPU's, with chunks that parameters are cut by."""
    small = {"chunk_bytes": 20_000}
    return [
        {"state_store": "cpu", **small},
        {"state_store": "ssd", "path": tmp_path / "one", "pinned_gib": 0.0005, **small},
        {"state_store": "ssd", "path": [tmp_path / "a", tmp_path / "b"], "pinned_gib": 0.0005, **small},
    ]
