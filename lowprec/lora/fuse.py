"""``fuse(model)``: find which LoRA layers read one input, by asking the model, and switch them to the fused product."""

from collections import Counter
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from lowprec.lora.layers import Handoff, Place, become_fused, why_not


@dataclass(slots=True)
class FuseReport:
    """What became of every LoRA layer."""

    groups: list[list[str]] = field(default_factory=list)
    """Names of the layers that are computed by one function, in the order of calling; singles are groups of one."""
    on_peft: dict[str, str] = field(default_factory=dict)
    """Layer -> why PEFT's own path computes it."""
    notes: list[str] = field(default_factory=list)

    def sizes(self) -> dict[int, int]:
        """Projections in a group -> number of such groups."""
        return dict(sorted(Counter(len(group) for group in self.groups).items(), reverse=True))

    def reasons(self) -> dict[str, int]:
        """Why not -> number of layers."""
        return dict(Counter(self.on_peft.values()))

    def summary(self) -> str:
        """One line for people."""
        fused = sum(len(group) for group in self.groups)
        words = ", ".join(f"{n} groups of {size}" if size > 1 else f"{n} alone" for size, n in self.sizes().items())
        text = f"{fused} of {fused + len(self.on_peft)} LoRA layers fused" + (f" ({words})" if words else "")
        rest = "; ".join(f"{n} on PEFT's path: {reason}" for reason, n in self.reasons().items())
        return ". ".join([text, *([rest] if rest else []), *self.notes]) + "."

    def to_dict(self) -> dict:
        """Everything, as plain JSON types."""
        return asdict(self) | {"reasons": self.reasons()}


def fuse(model: nn.Module) -> FuseReport:
    """Compute the LoRA layers of this one model by fused products. Call it when the model is on its device.

    Which layers read one input is observed, not guessed from names: the model is run once on two tokens, without
    gradients, in ``eval`` mode, its random state kept.

    Args:
        model: a ``PeftModel``. Other modules of the process are untouched.

    Returns:
        Which layers were fused together, and which stay on PEFT's path with the reason.
    """
    report = FuseReport()
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if _is_lora(module):
            reason = why_not(module)
            if reason is None:
                names[module] = name
            else:
                report.on_peft[name] = reason
    if not names:
        return report
    try:
        groups = _read_together(_calls(model, list(names)))
    except Exception as error:  # any model's forward: what it may raise is not ours to list
        groups = []
        first = str(error).splitlines()[0] if str(error) else ""
        report.notes.append(f"each by itself, since a trial run failed ({type(error).__name__}: {first[:120]})")
    grouped = {layer for group in groups for layer in group}
    groups += [[layer] for layer in names if layer not in grouped]
    handoff = Handoff()
    for first_layer, *others in groups:
        adapter = str(first_layer.active_adapters[0])  # type: ignore[index]
        become_fused(first_layer, Place(adapter, handoff, leads=others))  # type: ignore[arg-type]
        for other in others:
            become_fused(other, Place(adapter, handoff, follows=True))
        report.groups.append([names[layer] for layer in (first_layer, *others)])
    model.register_forward_hook(handoff.clear, always_call=True)
    return report


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import LoraLayer

    return isinstance(module, LoraLayer)


def _calls(model: nn.Module, layers: list[nn.Module]) -> list[tuple[nn.Module, torch.Tensor]]:
    """Every call of ``layers`` in one pass of the model, in order, with its input."""
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0]))) for layer in layers]
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device  # embeddings may stay on the host
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return calls


def _read_together(calls: list[tuple[nn.Module, torch.Tensor]]) -> list[list[nn.Module]]:
    """Runs of neighbouring calls with the very same tensor. A layer that is called twice has to be in one and the same
    run each time, or goes alone."""
    runs: list[list[nn.Module]] = []
    last = None
    for layer, x in calls:
        if x is last and layer not in runs[-1]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
        last = x
    seen: dict[nn.Module, list[nn.Module]] = {}
    split: set[nn.Module] = set()
    for run in runs:
        for layer in run:
            if seen.setdefault(layer, run) != run:
                split |= {layer, *run, *seen[layer]}
    unique = {id(run[0]): run for run in runs}
    return [run for run in unique.values() if not split & set(run) and _alike(run)]


def _alike(run: list[nn.Module]) -> bool:
    """Bases on one device with one number of inputs: what a group's stacked product needs."""
    return len({(layer.in_features, next(layer.parameters()).device) for layer in run}) == 1  # type: ignore[attr-defined]
