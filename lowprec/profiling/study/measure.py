"""One cell, built and measured. Memory that runs out is its result."""

import gc
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowprec.activations import keep_activations
from lowprec.attention import attend_without_masks
from lowprec.bench.train.ours import random_batch, random_model
from lowprec.bench.train.peers import to_bitsandbytes
from lowprec.config import Recipe, resolve
from lowprec.optim import AdamW
from lowprec.optim.options import build_schedule
from lowprec.prepare import wrap
from lowprec.profiling.alive import Alive
from lowprec.profiling.figures import OUT_OF_MEMORY
from lowprec.profiling.limit import limited
from lowprec.profiling.memory import GIB
from lowprec.profiling.session import Session
from lowprec.profiling.study.cells import PLAIN, Cell, Shape
from lowprec.train.step import TrainStep

KEPT = ("status", "tokens_per_second", "step_time_ms_p50", "step_time_ms_p90", "peak_vram_gib", "peak_reserved_gib")


def measure(cell: Cell, shape: Shape, accelerator: Accelerator, warmup: int, steps: int) -> dict[str, Any]:
    """The row of a cell: its levels, ``status`` (ok, out_of_memory, failed), and its figures."""
    began = time.perf_counter()
    row: dict[str, Any] = {"key": cell.key, **cell.to_dict(), "warmup": warmup, "steps": steps}
    on_gpu = accelerator.device.type == "cuda"
    counted = None if on_gpu else Alive(accelerator.device, limit=int(shape.limit_gib * GIB))
    try:
        with counted or limited(accelerator.device, shape.limit_on(on_gpu)):
            row |= _figures(cell, shape, accelerator, warmup, steps)
        if counted is not None:
            row["peak_vram_gib"] = max(moment.peak for moment in counted.moments) / GIB  # of tensors, on a processor
    except torch.OutOfMemoryError:  # while the model was built
        row |= {"status": OUT_OF_MEMORY}
    except Exception as error:  # a cell that cannot run, such as fp16 on a processor, is a cell as well
        row |= {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    accelerator.free_memory()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def recipe_of(cell: Cell) -> Recipe:
    """The cell as a recipe: its options are those that a user would set."""
    nf4 = cell.weights in ("qlora", "nf4")
    weights = "nf4" if nf4 else "bf16" if cell.weights == "lora" else cell.weights
    overrides = [
        "model.model_name_or_path=random", "data.path=none", "train.report_to=[]", "train.gradient_checkpointing=full",
        f"model.dtype={cell.dtype}", f"weights={weights}", f"optimizer={cell.optimizer}",
        *(["optimizer.state_dtype=int8"] if cell.stack != PLAIN else []),
    ]  # fmt: skip
    return resolve("lora", overrides)[0]


def _figures(cell: Cell, shape: Shape, accelerator: Accelerator, warmup: int, steps: int) -> dict[str, Any]:
    recipe, device = recipe_of(cell), accelerator.device
    model = random_model(shape.config, recipe.model.torch_dtype, device)
    model = (_plain if cell.stack == PLAIN else _own)(model, cell, recipe, device)
    optimizer = recipe.optimizer.build(model, recipe.state_store)
    try:
        schedule = build_schedule(optimizer, recipe.optimizer, warmup + steps)
        prepared = accelerator.prepare_model(model), accelerator.prepare_optimizer(optimizer)
        step = TrainStep(*prepared, schedule, accelerator, recipe.train.max_grad_norm)
        session = Session(
            model, optimizer, device=device, phases=step.phases, warmup_steps=warmup, steps=steps, closely=False
        )
        batch = random_batch(shape.config["vocab_size"], cell.batch, cell.length, device)
        tokens = batch.num_trained_tokens_global
        try:
            with session:
                while not session.done:
                    with session.step(tokens=tokens, trained_tokens=tokens):
                        step(batch, stop=False)
        except torch.OutOfMemoryError:
            pass  # the session knows
        figures = session.figures()
    finally:
        if isinstance(optimizer, AdamW):
            optimizer.close()
    row = {name: figures.get(name) for name in KEPT}
    row["energy_j_per_token"] = figures["power"].get("energy_j_per_token")
    row["energy_source"] = figures["power"]["source"]
    row["phases_ms"] = figures.get("phases_ms")
    if device.type == "cuda":
        row["peak_vram_gib"] = session.peak.allocated / GIB
    return row


def _plain(model: Any, cell: Cell, recipe: Recipe, device: torch.device) -> nn.Module:
    """transformers, PEFT and bitsandbytes, as the paper had them."""
    if cell.weights == "qlora":
        to_bitsandbytes(model, recipe.model.torch_dtype, device)
    model = recipe.adapter.attach(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).train()


def _own(model: Any, cell: Cell, recipe: Recipe, device: torch.device) -> nn.Module:
    """As ``lowprec train`` prepares a model."""
    attend_without_masks(model, cell.length)
    wrap(model, recipe.weights, frozen=True, device=device)
    model = recipe.adapter.attach(model)
    keep_activations(model, recipe.train.gradient_checkpointing)
    model.to(device).train()
    recipe.adapter.fuse(model)
    return model
