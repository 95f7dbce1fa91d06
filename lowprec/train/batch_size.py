"""``train.find_batch_size``: the largest micro-batch that fits, tried with training's own forward and backward pass."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowprec.config import Recipe
from lowprec.data import StepLoader
from lowprec.plan import Planner
from lowprec.plan.graphs import in_graphs
from lowprec.plan.run import find_machine
from lowprec.plan.states import Trained, states_of
from lowprec.train.resume import stored_division
from lowprec.train.state import random_state, set_random_state
from lowprec.train.step import backward, loss_sum

MARGIN = 0.02
"""Share of the memory that this process may take that is kept free: batches to come are cut otherwise and fragment
it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """How an effective batch is divided."""

    batch_size: int
    accumulation: int
    too_large: int | None
    """The next size, which did not fit; None where all that divide the effective batch do."""

    def told(self) -> str:
        """One sentence for the user."""
        tried = f", {self.too_large} did not" if self.too_large else ""
        return (
            f"train.find_batch_size: {self.batch_size} of the longest samples fit at once{tried}. A step takes "
            f"{self.batch_size * self.accumulation} samples as {self.accumulation} x {self.batch_size}."
        )


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> tuple[int | None, int | None]:
    """Try ``sizes`` from the smallest on, so that memory runs out once at most.

    Returns:
        The last that fits (None where none does), and the one that did not (None where all do).
    """
    best = None
    for size in sizes:
        if not fits(size):
            return best, size
        best = size
    return best, None


def settle_batch_size(
    recipe: Recipe,
    resume_from: Path | None,
    model: nn.Module,
    loader: StepLoader,
    accelerator: Accelerator,
    to_come: Callable[[int], int] = lambda rows: 0,
) -> Found | None:
    """Settle the recipe's division of its effective batch: as the checkpoint has it, or by trial.

    Args:
        resume_from: the checkpoint that the run goes on from, if any.
        model: as training calls it.
        to_come: rows of a micro-batch -> bytes of the device that a step takes beside what the trial does.

    Returns:
        What was found by trial; None where the checkpoint decided.
    """
    options = recipe.train
    effective = options.per_device_train_batch_size * options.gradient_accumulation_steps
    resumed = resume_from and stored_division(resume_from)
    if resumed and resumed[0] * resumed[1] == effective:
        options.per_device_train_batch_size, options.gradient_accumulation_steps = resumed
        return None
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    states = states_to_come(recipe, bare)
    found = find_batch_size(model, loader, accelerator, effective, lambda rows: states + to_come(rows))
    options.per_device_train_batch_size = found.batch_size
    options.gradient_accumulation_steps = found.accumulation
    return found


def find_batch_size(
    model: nn.Module,
    loader: StepLoader,
    accelerator: Accelerator,
    effective: int,
    reserved_bytes: Callable[[int], int],
) -> Found:
    """The largest size of a micro-batch that divides ``effective`` and fits, on the longest rows there are.

    Weights, optimizer states and random states are left as they are, and no gradient stays. With several processes all
    take the smallest of their findings.

    Args:
        model: as training calls it.
        effective: rows that a process takes in one optimizer step.
        reserved_bytes: of the device, for what comes later (the optimizer's states), by the rows of a micro-batch.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True)  # processes may fail alone: nothing is exchanged
    sizes = divisors(effective)
    best, too_large = largest_that_fits(
        sizes, lambda size: _fits(bare, loader, accelerator, size, size < effective, reserved_bytes(size))
    )
    shared = accelerator.gather(torch.tensor([best or 0], device=accelerator.device))
    size = int(shared.min())
    if size == 0:
        raise torch.OutOfMemoryError("A micro-batch of one sample, the longest, does not fit.")
    if size != best:
        too_large = next((larger for larger in sizes if larger > size), None)
    return Found(batch_size=size, accumulation=effective // size, too_large=too_large)


def states_to_come(recipe: Recipe, model: nn.Module) -> int:
    """Bytes on the device that the optimizer takes at its first step. A store elsewhere has its buffers already."""
    if recipe.choice("state_store") != "gpu":
        return 0
    trained = [Trained(name, p.numel(), p.dtype) for name, p in model.named_parameters() if p.requires_grad]
    return sum(nbytes for _, nbytes in states_of(recipe, trained).device)


def graphs_to_come(recipe: Recipe, config: Any, say: Callable[[str], None]) -> Callable[[int], int]:
    """Rows of a micro-batch -> bytes that its layers' graphs hold beside an ordinary step, as predicted. A trial takes
    ordinary steps: layers are recorded when a shape comes for the third time.

    Args:
        recipe: settled (:mod:`lowprec.plan.settle`).
        config: of the model.
        say: is told where the prediction fails; nothing is then added.
    """
    if not in_graphs(recipe):
        return lambda rows: 0
    planner = Planner(config, find_machine(None)[0])
    ordinary = replace(recipe, train=replace(recipe.train, cuda_graphs=False))

    def to_come(rows: int) -> int:
        try:
            return max(planner.predict(recipe, rows).total - planner.predict(ordinary, rows).total, 0)
        except Exception as error:  # graphs that were asked for, of a model that cannot be traced
            say(f"find_batch_size does not count the memory of CUDA graphs: {type(error).__name__}: {error}")
            return 0

    return to_come


def _fits(
    model: Any, loader: StepLoader, accelerator: Accelerator, size: int, accumulates: bool, reserved_bytes: int
) -> bool:
    """Take the passes of one size, the second with the first one's gradients alive, as accumulation has them."""
    device = accelerator.device
    chance = random_state()
    reserved = inputs = loss = None
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if device.type == "cuda":
                share = MARGIN * torch.cuda.get_per_process_memory_fraction()  # it takes no "cuda" without a number
                reserved_bytes += int(share * torch.cuda.get_device_properties(device).total_memory)
            reserved = torch.empty(reserved_bytes, dtype=torch.uint8, device=device)
            inputs = loader.longest(size)
            for _ in range(2 if accumulates else 1):
                loss = loss_sum(model, inputs) / inputs["labels"].numel()
                backward(accelerator, loss)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del reserved, inputs, loss
        model.zero_grad(set_to_none=True)
        set_random_state(chance)
        if device.type == "cuda":
            torch.cuda.empty_cache()
