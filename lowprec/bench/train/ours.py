"""A work by lowprec, on the path that ``lowprec train`` takes: wrap, adapter, activations, fused LoRA, TrainStep."""

import inspect
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lowprec.activations import keep_activations
from lowprec.attention import attend_without_masks
from lowprec.bench.train.clock import cap_memory, time_steps
from lowprec.bench.train.works import Work
from lowprec.config import Recipe, resolve
from lowprec.data import StepBatch
from lowprec.data.collate import trained_positions
from lowprec.layers.host_embedding import keep_on_host, unpin_tables
from lowprec.optim import AdamW
from lowprec.optim.options import build_schedule
from lowprec.plan.settle import settle_on
from lowprec.prepare import wrap
from lowprec.profiling.kernels import traced
from lowprec.train.step import TrainStep


def random_model(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A model of that shape with random weights, built where it fits: on the device, else in host memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape)
    torch.manual_seed(0)
    with torch.device("meta"):
        nbytes = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) * dtype.itemsize
    roomy = device.type == "cuda" and nbytes < 0.7 * torch.cuda.get_device_properties(device).total_memory
    with torch.device(device if roomy else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model


def run(work: Work, folder: Path, device: torch.device, closely: bool = True) -> dict:
    """Figures of one work, and what was converted, fused and kept; ``closely``: with the time of kernels by kind."""
    from transformers import AutoConfig

    recipe = recipe_of(work, folder, device)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="bf16" if recipe.model.dtype == "bf16" else "no"
    )
    choice = settle_on(recipe, device, config=AutoConfig.for_model(**work.shape))
    model = random_model(work.shape, recipe.model.torch_dtype, device)
    attend_without_masks(model, work.length)
    choice = choice.checked(model, device)
    frozen = recipe.choice("adapter") != "none"
    use_liger = recipe.train.use_liger_kernel
    layers = wrap(
        model,
        recipe.weights,
        frozen=frozen,
        device=device,
        use_liger_kernel=use_liger,
        in_graphs=choice.graphs,
    )
    model = recipe.adapter.attach(model)
    activations = keep_activations(model, choice.policy, choice.why, graphs=choice.graphs, no_graphs=choice.no_graphs)
    offloaded = keep_on_host(model, device) if recipe.train.offload_embeddings else None
    model.to(device).train()
    fused = recipe.adapter.fuse(model)
    optimizer = recipe.optimizer.build(model, recipe.state_store)
    if isinstance(optimizer, AdamW) and recipe.train.max_grad_norm is None:
        activations.update_in_backward(optimizer)
    schedule = build_schedule(optimizer, recipe.optimizer, work.warmup + work.timed)
    wrapped = accelerator.prepare_model(model)
    prepared = accelerator.prepare_optimizer(optimizer)
    step = TrainStep(wrapped, prepared, schedule, accelerator, recipe.train.max_grad_norm)
    batch = random_batch(work.shape["vocab_size"], work.batch, work.length, device)
    try:
        cap_memory(work.cap_gib, device)
        timing = time_steps(lambda: step(batch, stop=False).values[0], work.tokens, work.warmup, work.timed, device)
        watched = None
        if closely:
            with traced(device, None) as watched:
                step(batch, stop=False)
    finally:
        if isinstance(optimizer, AdamW):
            optimizer.close()
        unpin_tables(model)
    kernels = sorted({f"{row.scheme}: {row.kernel}" for row in layers.rows})
    parts = {kind: round(share * watched.total_ms, 3) for kind, share in watched.shares.items()} if watched else None
    facts = {
        "kernel_ms": parts,
        "layers": layers.counts(),
        "kernels": kernels,
        "activations": activations.to_dict(),
        "embeddings": offloaded,
    }
    reasons = sorted({f"{'x'.join(map(str, row.shape))}: {row.reason}" for row in layers.rows if row.reason})
    return timing.to_dict() | facts | {"reasons": reasons, "lora": fused.summary() if fused else None}


def recipe_of(work: Work, folder: Path, device: torch.device) -> Recipe:
    overrides = ["model.model_name_or_path=random", "data.path=none", *work.overrides]
    if not any(override.startswith("model.dtype=") for override in overrides):
        overrides.append("model.dtype=" + ("bf16" if device.type == "cuda" else "fp32"))
    if "state_store=ssd" in work.overrides:
        overrides.append(f"state_store.path={folder / 'states'}")
    recipe = resolve(work.recipe, overrides)[0]
    recipe.train.per_device_train_batch_size, recipe.data.max_length = work.batch, work.length  # what auto settles by
    return recipe


def random_batch(vocab_size: int, rows: int, length: int, device: torch.device) -> StepBatch:
    """One micro-batch of random tokens, all of which are trained."""
    ids = torch.randint(0, vocab_size, (rows, length), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    inputs["trained_positions"] = trained_positions(ids)
    tokens = {name: rows * length for name in inspect.signature(StepBatch).parameters if name.startswith("num_t")}
    return StepBatch(micro_batches=[inputs], num_padding=0, epoch=0.0, state={}, **tokens)
