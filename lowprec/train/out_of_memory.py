"""Running out of CUDA memory, told as what held it and which keys lower it."""

import torch
from torch import nn

from lowprec.config import Recipe
from lowprec.errors import UserError
from lowprec.layers.host_embedding import why_not_on_host
from lowprec.plan.graphs import in_graphs

GIB = 2**30


class OutOfMemoryError(UserError):
    """The device's memory did not suffice."""


def explain(recipe: Recipe, model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> str:
    """One paragraph: what is allocated by kind, and what to change, the largest gain first."""
    if not torch.cuda.is_available():
        return f"Out of memory. What lowers it, the cheapest first: {'; '.join(remedies(recipe))}."
    free, total = torch.cuda.mem_get_info()
    parameters = [p for p in model.parameters() if p.is_cuda] if model is not None else []
    weights = sum(p.nbytes for p in parameters)
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    states = sum(
        value.nbytes
        for state in (optimizer.state.values() if optimizer else ())
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.is_cuda
    )
    peak = torch.cuda.max_memory_allocated()
    rest = max(peak - weights - gradients - states, 0)
    can_offload = not torch.distributed.is_initialized() and model is not None and why_not_on_host(model) is None
    held = (
        f"weights {weights / GIB:.2f} GiB, gradients {gradients / GIB:.2f} GiB, optimizer states {states / GIB:.2f} "
        f"GiB, activations and workspace {rest / GIB:.2f} GiB at the peak"
    )
    return (
        f"Out of GPU memory: {total / GIB:.2f} GiB in all, {peak / GIB:.2f} GiB taken by this run at its peak "
        f"({held}). What lowers it, the cheapest first: {'; '.join(remedies(recipe, states > rest, can_offload))}."
    )


def remedies(recipe: Recipe, states_dominate: bool = False, can_offload: bool = False) -> list[str]:
    """Keys and values that lower the memory, the cheapest first. ``can_offload``: the embeddings may go to the host."""
    train = recipe.train
    found = ["train.cuda_graphs=false"] if in_graphs(recipe) else []
    if can_offload:
        found.append("train.offload_embeddings=true")
    lighter = {"none": "full", "selective": "full", "full": "offload", "auto": "full"}.get(train.gradient_checkpointing)
    if lighter is not None:
        found.append(f"train.gradient_checkpointing={lighter}")
    if train.per_device_train_batch_size > 1:
        size = train.per_device_train_batch_size
        half, accumulation = size // 2, train.gradient_accumulation_steps * 2
        found.append(
            f"train.per_device_train_batch_size={half} train.gradient_accumulation_steps={accumulation} "
            "(about the same effective batch)"
        )
    if recipe.data.max_length > 256:
        found.append(f"data.max_length={recipe.data.max_length // 2}")
    if recipe.choice("adapter") == "none":
        offload = "state_store=cpu or state_store=ssd state_store.path=..."
        found.insert(0, offload) if states_dominate else found.append(offload)
        found.append("adapter=lora")
    elif recipe.choice("weights") != "nf4":
        found.append("weights=nf4")
    return found
