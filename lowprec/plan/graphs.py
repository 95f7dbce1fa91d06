"""What changes in memory where decoder layers are replayed as CUDA graphs (lowprec.activations.graphs).

What a layer needs while it runs lies in a pool of the graphs' own, which nothing else can use between replays. With
``none``, so does what it keeps for backward, and that stays there for good. Beside the pool there are two places for a
layer's input and gradient, and cuBLAS has a workspace for one more stream.
"""

from collections.abc import Sequence
from dataclasses import replace

from lowprec.config import Recipe
from lowprec.plan.allocator import CachingAllocator, rounded
from lowprec.plan.ledger import Peak, peak_of
from lowprec.plan.tape import Event
from lowprec.plan.tracker import BACKWARD, FORWARD


def in_graphs(recipe: Recipe) -> bool:
    """Whether layers are replayed; ``auto`` is to be settled before (settle.py). ``lowprec.activations.why_no_graphs``
    says what else there is against them."""
    return recipe.train.cuda_graphs is True and recipe.train.gradient_checkpointing != "selective"


def with_graphs(
    events: Sequence[Event], *, recompute: bool, hidden: int, workspace: int, expandable: bool
) -> tuple[Peak, int]:
    """The peak of a step and what the allocator reserves, in bytes.

    Args:
        events: of a step as it is without graphs.
        recompute: whether layers are computed again in backward.
        hidden: bytes of a layer's input.
        workspace: bytes of that of cuBLAS for one stream.
    """
    main, pool = _apart(events, recompute)
    beside = 2 * hidden + workspace
    reserved = [CachingAllocator(expandable=expandable).replay(part) for part in (main, pool)]
    kept = sum(rounded(e.nbytes) * (1 if e.comes else -1) for e in pool)  # all else in it goes where it came
    # Layers are recorded one by one in a forward pass, when no gradient is there: not more than backward holds.
    peak = peak_of(events if recompute else main)
    parts = dict(peak.parts)
    parts["activations"] += kept
    parts["workspace"] += beside
    more = kept + beside
    by_phase = {phase: nbytes + more for phase, nbytes in peak.by_phase.items()}
    peak = replace(peak, allocated=peak.allocated + more, parts=parts, by_phase=by_phase)
    return peak, sum(reserved) + beside


def _apart(events: Sequence[Event], recompute: bool) -> tuple[list[Event], list[Event]]:
    """The events outside the graphs' pool, and those in it."""
    came = {e.storage: e for e in events if e.comes}
    goes_in = {e.storage: e.run for e in events if not e.comes}
    main: list[Event] = []
    pool: list[Event] = []
    for event in events:
        first = came[event.storage]
        passes = goes_in.get(event.storage) == first.run
        if not first.in_layer or first.phase not in (FORWARD, BACKWARD):
            main.append(event)
        elif passes:
            pool.append(event)
        elif event.kind == "gradients":
            main.append(event)
        elif first.phase == FORWARD and recompute:
            main.append(event)  # the input of the layer above
        elif first.phase == FORWARD and event.comes:
            pool.append(event)  # for good
        # What is left is the gradient that a layer hands on: it has a place.
    return main, pool
