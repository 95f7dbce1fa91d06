"""How long this host takes for one operator of a training step: of steps so small that their kernels take no time."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from lowprec.bench.train.ours import recipe_of, run
from lowprec.bench.train.works import TINY, Work
from lowprec.machine import named_card
from lowprec.ops.backends import no_triton
from lowprec.plan.step import TracedRecipe

SMALL = Work(
    "host", TINY | {"num_hidden_layers": 8}, 1, 64, "lora",
    ("weights=bf16", "train.gradient_checkpointing=full", "train.cuda_graphs=false"), "lora", warmup=4, timed=15,
)  # fmt: skip
"""LoRA, layers computed again: the longest way through the host that many recipes take."""


OWN = replace(SMALL, overrides=("weights=int8_hadamard", *SMALL.overrides[1:]))
"""The same over 8-bit codes, with a cast and a product of lowprec's for each layer."""


def host_us_per_call(device: torch.device) -> tuple[float, float | None]:
    """Microseconds of a step for each operator that ``lowprec plan`` counts in it: PyTorch's, and lowprec's own, which
    take what PyTorch's leave of a step that has both. None for these on cards before capability 8.0, which run none."""
    step_us, calls, _ = _step(SMALL, device)
    host_us = step_us / calls
    if device.type == "cuda" and no_triton(device) is not None:
        return host_us, None
    step_us, calls, own_calls = _step(OWN, device)
    return host_us, max((step_us - (calls - own_calls) * host_us) / own_calls, host_us)


def _step(work: Work, device: torch.device) -> tuple[float, int, int]:
    """Microseconds, operators, and those of lowprec among them."""
    with tempfile.TemporaryDirectory() as folder:
        figures = run(work, Path(folder), device)
        recipe = recipe_of(work, Path(folder), device)
    # The card matters to memory alone.
    traced = TracedRecipe(recipe, AutoConfig.for_model(**work.shape), named_card("H100"))
    runs = traced.trace(work.batch, work.length).runs
    return 1e3 * figures["step_ms_p50"], sum(part.calls for part in runs), sum(part.own_calls for part in runs)
