"""The policies of ``train.gradient_checkpointing`` over tensors without data: what goes to the host takes no device
memory, and what ``selective`` would time is predicted."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowprec.activations import keep_activations
from lowprec.activations.offload import Offload
from lowprec.activations.selective import Cost, Selective, choose
from lowprec.machine import Machine
from lowprec.plan.operators import products_of
from lowprec.plan.timing import product_ms


def keep_activations_like(policy: str, model: nn.Module, machine: Machine) -> None:
    """``keep_activations`` with stand-ins where the policy reads numbers or moves them."""
    function = keep_activations(model, policy).function
    stand_ins = {Offload: OffloadWithoutData, Selective: lambda: SelectiveWithoutData(machine)}
    stand_in = stand_ins.get(type(function))  # type: ignore[arg-type]
    if stand_in is None:
        return
    shared = stand_in()
    for layer in model.modules():
        if getattr(layer, "_gradient_checkpointing_func", None) is function:
            layer._gradient_checkpointing_func = shared  # type: ignore[assignment]


class OffloadWithoutData(Offload):
    """What is sent is only remembered by its shape."""

    def _send(self, entry: Any) -> None:
        if entry.resident is not None:
            entry.host = entry.resident.shape, entry.resident.dtype
            self.sent_bytes += entry.resident.nbytes
            entry.resident = None

    def _fetch(self, entry: Any) -> None:
        shape, dtype = entry.host
        entry.resident = torch.empty(shape, dtype=dtype)


class SelectiveWithoutData(Selective):
    """Keeps what the machine's rates say is dear."""

    def __init__(self, machine: Machine):
        super().__init__()
        self._machine = machine

    def __call__(self, function: Any, *args: Any) -> Any:
        if self.kept is None and torch.is_grad_enabled():
            watch = _Estimate(self._machine)
            leaves = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
            with watch:
                function(*leaves)
            budget = self.kept_inputs * sum(arg.nbytes for arg in args if isinstance(arg, Tensor))
            self.kept = choose(watch.costs(), budget)
            self._keys = frozenset(cost.key for cost in self.kept)
        return checkpoint(function, *args, use_reentrant=False, context_fn=self._contexts)


class _Estimate(TorchDispatchMode):
    """Predicts the time of every operation of a layer whose result could be kept."""

    def __init__(self, machine: Machine):
        super().__init__()
        self._machine = machine
        self._calls: Counter[str] = Counter()
        self._seen: list[tuple[Cost, list[Tensor], list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        key = (str(func), self._calls[str(func)])
        self._calls[str(func)] += 1
        inputs = [value for value in args if isinstance(value, Tensor)]
        results = [value for value in (out if isinstance(out, tuple | list) else [out]) if isinstance(value, Tensor)]
        nbytes = sum(tensor.nbytes for tensor in results)
        places = {tensor.untyped_storage()._cdata for tensor in inputs}
        if not inputs or not nbytes or func._schema.is_mutable:
            return out
        if any(tensor.untyped_storage()._cdata in places for tensor in results):
            return out
        products = list(products_of(func, args, results))
        moved = nbytes + sum(tensor.nbytes for tensor in inputs)
        ms = sum(product_ms(self._machine, p) for p in products) if products else self._machine.traffic_ms(moved)
        self._seen.append((Cost(key, ms / 1e3, nbytes), results, [tensor._version for tensor in results]))
        return out

    def costs(self) -> list[Cost]:
        """Of the operations whose results nobody wrote over."""
        same = [cost for cost, out, versions in self._seen if [t._version for t in out] == versions]
        self._seen.clear()
        return same
