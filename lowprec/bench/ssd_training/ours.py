"""One work with ``lowprec.AdamW``: seconds a step and its parts, bytes, peaks, what was not hidden."""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowprec.bench.ssd_training.process import Marks, host_gb, host_peak_gb, peak_gb, timed_step
from lowprec.bench.ssd_training.works import Work
from lowprec.bench.train.clock import cap_memory
from lowprec.bench.train.ours import random_model
from lowprec.optim import AdamW


def run(work: Work, path: Path, device: torch.device) -> dict[str, Any]:
    """Train ``work`` with its states in ``path``. The first step, which reads nothing, is a row but not in medians."""
    cap_memory(work.cap_gib, device)
    model = build(work, device)
    ids = torch.randint(0, work.shape["vocab_size"], (work.batch, work.length), device=device)
    compute_s = _compute_s(model, ids)
    bare_gb, before_gb = peak_gb(), host_gb()
    store: dict[str, Any] = {"state_store": work.store}
    if work.store == "ssd":
        store |= {"path": path, "pinned_gib": work.pinned_gib, "reserve_checkpoints": 0}
    begin = time.perf_counter()
    optimizer = AdamW(model.named_parameters(), lr=1e-5, state_dtype=work.state_dtype, **store)
    build_s = time.perf_counter() - begin
    if work.max_grad_norm is None:
        optimizer.update_in_backward()
    rows = []
    for _ in range(work.steps):
        waited = optimizer.traffic.unhidden_s if optimizer.traffic else 0.0
        marks = Marks()
        row, loss = timed_step(partial(_step, model, ids, optimizer, work.max_grad_norm, marks))
        row |= dict(zip(("forward_s", "backward_s", "update_s"), marks.seconds(), strict=True))
        if optimizer.traffic:
            row["waited_s"] = round(optimizer.traffic.unhidden_s - waited, 3)
        rows.append(row | {"loss": round(loss.item(), 4)})
    begin = time.perf_counter()
    optimizer.flush()
    figures = {
        "parameters": sum(param.numel() for param in model.parameters()),
        "step_s_p50": statistics.median(row["step_s"] for row in rows[1:]),
        "compute_s": round(compute_s, 4),
        "steps": rows,
        "build_s": round(build_s, 3),
        "flush_s": round(time.perf_counter() - begin, 3),
        "peak_gb": peak_gb(),
        "weights_and_activations_gb": bare_gb,
        "host_growth_gb": round(host_peak_gb() - before_gb, 3),
        "notes": optimizer.notes,
        "statistics": optimizer.statistics(),
    }
    optimizer.close()
    return figures


def build(work: Work, device: torch.device) -> nn.Module:
    """The work's model with random bf16 weights on ``device``, ready to train."""
    model = random_model(work.shape, torch.bfloat16, device).to(device)
    if work.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _compute_s(model: nn.Module, ids: torch.Tensor) -> float:
    """Seconds of forward and backward alone, each gradient freed as it comes: the shortest of three, after one."""

    def free(param: torch.Tensor) -> None:
        param.grad = None

    handles = [param.register_post_accumulate_grad_hook(free) for param in model.parameters()]
    times = [timed_step(lambda: model(input_ids=ids, labels=ids).loss.backward())[0]["step_s"] for _ in range(4)]
    for handle in handles:
        handle.remove()
    return min(times[1:])


def _step(
    model: nn.Module, ids: torch.Tensor, optimizer: AdamW, max_grad_norm: float | None, marks: Marks
) -> torch.Tensor:
    marks.mark()
    loss = model(input_ids=ids, labels=ids).loss
    marks.mark()
    loss.backward()
    marks.mark()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    marks.mark()
    return loss.detach()
