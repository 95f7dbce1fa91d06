"""A recorder of graphs for the CPU, and training by layers that it recorded."""

from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

from lowprec.activations import keep_activations


def _itself(tensor):
    return tensor


class Rehearsal:
    """A recorder for the CPU: a replay computes the function on what stands in the places then. What backward leaves
    lies in tensors that all layers write to, each its own on top of the others'."""

    def __init__(self):
        self.replays = 0
        self._shared = {}

    def prepare(self):
        pass

    def forget(self):
        self._shared = {}

    def record(self, function):
        first = function()
        if function.__name__ == "backward":
            left = [
                None if g is None else self._shared.setdefault((i, g.shape), g.clone()) for i, g in enumerate(first)
            ]
        else:
            left = [result.clone() for result in first]

        def replay():
            self.replays += 1
            for shared in self._shared.values():
                shared.fill_(float("nan"))
            with saved_tensors_hooks(_itself, _itself):  # a replay saves nothing
                for place, tensor in zip(left, function(), strict=True):
                    if tensor is not None:
                        place.copy_(tensor)

        return replay, left


def graphed(model, policy, monkeypatch):
    recorder = Rehearsal()
    monkeypatch.setattr("lowprec.activations.graphs.Recorder", lambda: recorder)
    return keep_activations(model, policy, graphs=True), recorder


def batch(step: int, rows: int = 2, length: int = 12) -> dict:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 256, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def train(model, steps, autocast=False, batches=batch, micro=1):
    """Losses and weights after a few steps of gradient descent."""
    model.train()
    losses = []
    for step in range(steps):
        for part in range(micro):
            context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
            with context:
                loss = model(**batches(step * micro + part)).loss
            loss.backward()
            losses.append(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    return losses, [p.detach().clone() for p in model.parameters()]


def same(one, other):
    for a, b in zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def adapted(model):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(model.requires_grad_(False), config)
