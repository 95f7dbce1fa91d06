"""How long this host takes for what a training step launches."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from lowprec.bench.train.ours import recipe_of, run
from lowprec.bench.train.works import GRAPHS, NO_GRAPHS, TINY, Work
from lowprec.machine import named_card
from lowprec.ops.backends import no_triton
from lowprec.plan.step import TracedRecipe

ONE_BATCH = "train.gradient_accumulation_steps=1"
SMALL = Work(
    "host", TINY | {"num_hidden_layers": 8}, 1, 64, "lora",
    ("weights=bf16", "train.gradient_checkpointing=full", ONE_BATCH, NO_GRAPHS), "lora", warmup=4, timed=15,
)  # fmt: skip
"""LoRA, layers computed again: the longest way through the host that many recipes take."""
OWN = replace(SMALL, overrides=("weights=int8_hadamard", *SMALL.overrides[1:]))
"""The same over 8-bit codes, with a cast and a product of lowprec's for each layer."""
REPLAYED = replace(SMALL, overrides=(*SMALL.overrides[:-1], GRAPHS))
"""The same with its layers replayed as CUDA graphs."""
DEEPER = replace(REPLAYED, shape=TINY | {"num_hidden_layers": 24})


def host_times(device: torch.device) -> dict[str, float | None]:
    """What ``lowprec plan`` counts with, by the names of ``Machine``'s fields. lowprec's own operators take what
    PyTorch's leave of a step that has both, a replay what deeper models take longer. None for what this device does
    not run: Triton's kernels come with capability 8.0, graphs with CUDA."""
    plain = _step(SMALL, device)
    host_us = plain.us / plain.calls
    own_us = replay_us = None
    if device.type != "cuda" or no_triton(device) is None:
        coded = _step(OWN, device)
        own_us = max((coded.us - (coded.calls - coded.own_calls) * host_us) / coded.own_calls, host_us)
    if device.type == "cuda":
        few, many = _step(REPLAYED, device), _step(DEEPER, device)
        if few.replays and many.replays:
            replay_us = max((many.us - few.us) / (many.replays - few.replays), host_us)
    return {"host_us": host_us, "own_host_us": own_us, "replay_us": replay_us}


@dataclass(frozen=True, slots=True)
class _Step:
    us: float
    """Of the host."""
    calls: int
    """Operators that a plan counts."""
    own_calls: int
    """Of them, lowprec's."""
    replays: int
    """Graphs that a step launches: a layer's forward, and its backward."""


def _step(work: Work, device: torch.device) -> _Step:
    with tempfile.TemporaryDirectory() as folder:
        figures = run(work, Path(folder), device)
        recipe = recipe_of(work, Path(folder), device)
    # The card matters to memory alone.
    traced = TracedRecipe(recipe, AutoConfig.for_model(**work.shape), named_card("H100"))
    runs = traced.trace(work.batch, work.length).runs
    calls, own_calls = sum(part.calls for part in runs), sum(part.own_calls for part in runs)
    graphs = figures["activations"].get("cuda_graphs", {}).get("graphs", 0)
    return _Step(1e3 * figures["host_ms_p50"], calls, own_calls, graphs)
