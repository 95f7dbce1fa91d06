"""Which module is at work: by name, in forward, in backward, and in what backward recomputes of forward."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter


class ModuleStack:
    """``current`` is the innermost module at work, while hooks are attached.

    In backward a module is at work from the arrival of its output's gradient until its input's gradient is there.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._names = (
            {} if model is None else {module: plain_name(name) for name, module in model.named_modules() if name}
        )
        self._forward: list[str] = []
        self._backward = ""
        self._recomputes = False

    @property
    def current(self) -> str:
        """Empty outside all modules."""
        return self._forward[-1] if self._forward else self._backward

    def restart(self) -> None:
        """A new phase begins, in which no module is at work yet."""
        self._backward = ""

    def attach(self, on_recompute: Callable[[bool], None]) -> list[Any]:
        """Hook every module; ``on_recompute`` is told when backward begins to compute forward again, and ends.

        Returns:
            The hooks, to be removed.
        """
        hooks: list[Any] = []
        for module, name in self._names.items():
            hooks.append(module.register_forward_pre_hook(self._before(name, on_recompute), with_kwargs=True))
            # always_call: a recomputation ends by an exception as soon as all that backward needs is there.
            hooks.append(module.register_forward_hook(self._after(name, on_recompute), always_call=True))
        return hooks

    def _before(self, name: str, on_recompute: Callable[[bool], None]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._forward and in_backward():
                self._recomputes = True
                on_recompute(True)
            self._forward.append(name)
            parent = self._forward[-2] if len(self._forward) > 1 else ""
            for value in tree_iter((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    value.register_hook(self._leaving(name, parent))

        return hook

    def _after(self, name: str, on_recompute: Callable[[bool], None]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while self._forward and self._forward.pop() != name:
                pass
            for value in tree_iter(output):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    value.register_hook(self._entering(name))
            if self._recomputes and not self._forward:
                self._recomputes = False
                on_recompute(False)

        return hook

    def _entering(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            if not self._backward.startswith(f"{name}."):  # its last part gave the same tensor, and is the one at work
                self._backward = name

        return hook

    def _leaving(self, name: str, parent: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            if self._backward == name:
                self._backward = parent

        return hook


def in_backward() -> bool:
    """Whether autograd is at work in this thread."""
    return torch._C._current_graph_task_id() != -1


def collapsed(name: str) -> str:
    """A module's name without the numbers of its layers: ``layers.3.mlp`` is ``layers.*.mlp``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def plain_name(name: str) -> str:
    """Without what PEFT and data parallelism put around."""
    name = re.sub(r"^(module\.)?(base_model\.model(\.|$))?", "", name)
    return re.sub(r"\.(base_layer|default)$", "", name)
