"""How long this host takes for one operator of a training step: of a step so small that its kernels take no time."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig

from lowprec.bench.train.ours import recipe_of, run
from lowprec.bench.train.works import TINY, Work
from lowprec.machine import named_card
from lowprec.plan.step import TracedRecipe

SMALL = Work(
    "host", TINY | {"num_hidden_layers": 8}, 1, 64, "lora",
    ("weights=bf16", "train.gradient_checkpointing=full", "train.cuda_graphs=false"), "lora", warmup=4, timed=15,
)  # fmt: skip
"""LoRA, layers computed again: the longest way through the host that many recipes take."""


def host_us_per_call(device: torch.device) -> float:
    """Microseconds of a step for each operator that ``lowprec plan`` counts in it."""
    with tempfile.TemporaryDirectory() as folder:
        figures = run(SMALL, Path(folder), device)
        recipe = recipe_of(SMALL, Path(folder), device)
    # The card matters to memory alone.
    traced = TracedRecipe(recipe, AutoConfig.for_model(**SMALL.shape), named_card("H100"))
    calls = sum(part.calls for part in traced.trace(SMALL.batch, SMALL.length).runs)
    return 1e3 * figures["step_ms_p50"] / calls
