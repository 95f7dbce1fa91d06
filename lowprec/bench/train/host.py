"""How long this host takes for what a training step launches."""

import tempfile
from dataclasses import replace
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
OWN = replace(SMALL, name="host, 8-bit", overrides=("weights=int8_hadamard", *SMALL.overrides[1:]))
"""The same over 8-bit codes, with a cast and a product of lowprec's for each layer."""
REPLAYED = replace(SMALL, name="host, replayed", overrides=(*SMALL.overrides[:-1], GRAPHS))
"""The same with its layers replayed as CUDA graphs."""
DEEPER = replace(REPLAYED, name="host, deeper", shape=TINY | {"num_hidden_layers": 24})


ROUNDS = 2
"""The lesser time of a work counts, since other work of the machine only ever adds; and in a process that has just
started the same steps took the host up to twice as long."""


def host_times(device: torch.device) -> dict[str, float | None]:
    """What ``lowprec plan`` counts with, by the names of ``Machine``'s fields. lowprec's own operators take what
    PyTorch's leave of a step that has both, a replay what deeper models take longer. None for what this device does
    not run: Triton's kernels come with capability 8.0, graphs with CUDA."""
    works = [SMALL]
    works += [OWN] if device.type != "cuda" or no_triton(device) is None else []
    works += [REPLAYED, DEEPER] if device.type == "cuda" else []
    times: dict[str, list[float]] = {work.name: [] for work in works}
    replays: dict[str, int] = {}
    for work in works * ROUNDS:
        with tempfile.TemporaryDirectory() as folder:
            figures = run(work, Path(folder), device, closely=False)
        times[work.name].append(1e3 * figures["host_ms_p50"])
        replays[work.name] = figures["activations"].get("cuda_graphs", {}).get("graphs", 0)
    us = {name: min(found) for name, found in times.items()}
    calls, _ = _calls(SMALL, device)
    host_us, own_us, replay_us = us[SMALL.name] / calls, None, None
    if OWN in works:
        calls, own_calls = _calls(OWN, device)
        own_us = max((us[OWN.name] - (calls - own_calls) * host_us) / own_calls, host_us)
    if REPLAYED in works and replays[REPLAYED.name] and replays[DEEPER.name]:
        more = replays[DEEPER.name] - replays[REPLAYED.name]
        replay_us = max((us[DEEPER.name] - us[REPLAYED.name]) / more, host_us)
    return {"host_us": host_us, "own_host_us": own_us, "replay_us": replay_us}


def _calls(work: Work, device: torch.device) -> tuple[int, int]:
    """Operators that a plan counts in a step, and those of lowprec among them."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(work, Path(folder), device)
    # The card matters to memory alone.
    traced = TracedRecipe(recipe, AutoConfig.for_model(**work.shape), named_card("H100"))
    runs = traced.trace(work.batch, work.length).runs
    return sum(part.calls for part in runs), sum(part.own_calls for part in runs)
