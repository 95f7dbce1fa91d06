"""Memory of layers that are replayed as graphs, on a step that is written down."""

import pytest

from lowprec.plan.graphs import with_graphs
from lowprec.plan.tape import Event

MIB = 2**20
WEIGHTS, HEAD, INPUT, TEMPORARY = 100 * MIB, 30 * MIB, 2 * MIB, 20 * MIB
"""Of the model, of the loss, of a layer, and in it while it runs."""


def step() -> list[Event]:
    """Two layers forward, the loss, and backward; each layer's run has a temporary."""
    events = [Event("model", True, "weights", WEIGHTS, "weights", True, 0)]
    for layer in (0, 1):
        events.append(Event("forward", True, f"kept {layer}", INPUT, "activations", True, 1 + layer))
        events += both("forward", f"forward {layer}", "activations", True, 1 + layer, TEMPORARY)
    events += both("loss", "logits", "logits", False, 3, HEAD)
    for layer in (1, 0):
        run = 5 - layer
        events += both("backward", f"backward {layer}", "workspace", True, run, TEMPORARY)
        events.append(Event("backward", True, f"gradient {layer}", MIB, "gradients", True, run))
        events.append(Event("backward", False, f"kept {layer}", INPUT, "activations", True, run))
    return events + [Event("update", False, f"gradient {layer}", MIB, "gradients", True, 6) for layer in (1, 0)]


def both(phase: str, name: str, kind: str, in_layer: bool, run: int, size: int) -> list[Event]:
    return [Event(phase, comes, name, size, kind, in_layer, run) for comes in (True, False)]


@pytest.mark.parametrize("recompute", [True, False])
def test_the_pool_is_the_layers_own(recompute):
    peak, reserved = with_graphs(step(), recompute=recompute, hidden=INPUT, workspace=8 * MIB, expandable=True)
    beside = 2 * INPUT + 8 * MIB
    assert peak.allocated == WEIGHTS + 2 * INPUT + HEAD + beside, "the loss holds most"
    # Recorded layers give their temporaries back; what `none` keeps stays when all of it is used.
    kept, temporary = (INPUT, TEMPORARY) if recompute else (2 * INPUT, 0)
    most = WEIGHTS + 2 * INPUT + temporary if recompute else WEIGHTS + kept + 2 * MIB
    assert peak.by_phase["backward"] == most + beside
    assert sum(peak.parts.values()) == peak.allocated
    apart = WEIGHTS + HEAD + TEMPORARY + 2 * INPUT + beside
    assert apart <= reserved <= apart + 4 * 20 * MIB, "loss and layers do not share memory; pages of 20 MiB"
