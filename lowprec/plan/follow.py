"""Turn any model and any loop over it into a tape: marks the layers, the gradients and what stays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lowprec.layers.host_embedding import host_tables
from lowprec.plan.tape import STILL, Tape
from lowprec.plan.tracker import BACKWARD, FORWARD, LOSS, Tracker

CUBLAS_WORKSPACE = {9: 4096 * 8 * 1024}
"""First number of the compute capability -> bytes; others 4096 * 2 + 16 * 8 KiB (ATen/cuda/CublasHandlePool.cpp)."""
CUBLAS_WORKSPACE_OTHER = (4096 * 2 + 16 * 8) * 1024

GRADIENT = ".grad"


def cublas_workspace(capability: tuple[int, int] | None) -> int:
    """Bytes that cuBLAS keeps for one handle and stream."""
    return CUBLAS_WORKSPACE.get((capability or (9, 0))[0], CUBLAS_WORKSPACE_OTHER)


@dataclass
class Followed:
    """A model whose hooks tell the tracker of the moment where a step stands. Make one, then follow steps."""

    model: nn.Module
    num_layers: int
    vocab_size: int | None
    capability: tuple[int, int] = (9, 0)
    cublas_handles: int = 1
    """Each keeps its workspace from PyTorch's allocator. A loop that leaves backward to autograd's thread has two."""
    prefix: str = field(init=False, default="")
    tracker: Tracker = field(init=False)

    def __post_init__(self) -> None:
        layers = find_layers(self.model, self.num_layers)
        self.prefix = next((name for name, module in self.model.named_modules() if module is layers), "")
        for number, layer in enumerate(layers or ()):  # type: ignore[arg-type,var-annotated]
            layer.register_forward_pre_hook(self._before(number), with_kwargs=True)
            # Recomputing stops at the last tensor that is needed, by an exception: hence always_call.
            layer.register_forward_hook(self._after(number), always_call=True)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._mark_gradient)

    def follow(self, step: Callable[[], None], buffers: Sequence[Tensor] = ()) -> Tape:
        """The tape of ``step``, which tells its phases by ``begin``. It begins with all that is there before.

        Args:
            buffers: what stays, beside the model. The optimizer's states come by ``Tape.with_states``.
        """
        self.tracker = Tracker(self.vocab_size)
        self.tracker.tape.num_layers = self.num_layers
        with self.tracker:
            self._lay_out(buffers)
            step()
        return self.tracker.tape

    def begin(self, phase: str, layer: int | None = None) -> None:
        self.tracker.keeps = phase in (FORWARD, LOSS)
        self.tracker.tape.begin(phase, layer)

    @property
    def phase(self) -> str:
        return self.tracker.tape.runs[-1].phase

    def layer_of(self, name: str) -> int | None:
        """The layer that the parameter of that name is in."""
        head, _, rest = name.partition(f"{self.prefix}.")
        number = rest.partition(".")[0]
        return int(number) if self.prefix and head == "" and number.isdigit() else None

    def _lay_out(self, buffers: Sequence[Tensor]) -> None:
        stays = [(self.layer_of(name), name, tensor) for name, tensor in all_tensors(self.model)]
        gradients = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        stays += [(self.layer_of(name), GRADIENT, gradient) for name, gradient in gradients]
        for layer, name, tensor in sorted(stays, key=lambda entry: -1 if entry[0] is None else entry[0]):
            if self.tracker.tape.runs[-1].layer != layer:
                self.begin(STILL, layer)
            kind = "gradients" if name == GRADIENT else "adapters" if is_adapter(name) else "weights"
            self.tracker.hold(tensor, kind)
        self.begin(STILL)
        for buffer in buffers:
            self.tracker.hold(buffer, "workspace")
        for _ in range(self.cublas_handles):
            self.tracker.reserve(cublas_workspace(self.capability), "workspace")

    def _mark_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.tracker.hold(parameter.grad, "gradients")

    def _before(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.tracker.keeps = True
            if self.phase != FORWARD:  # computed again in backward
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            if number == 0 and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.begin(BACKWARD))
            self.begin(FORWARD, number)

        return hook

    def _after(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self.tracker.keeps = self.phase == FORWARD
            if not self.tracker.keeps:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.begin(BACKWARD, number))
            if number == self.num_layers - 1:
                self.begin(LOSS)

        return hook


def find_layers(model: nn.Module, num_layers: int) -> nn.ModuleList | None:
    """The list of the model's layers: the first of that length, which is the outermost."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers)
    return next(lists, None)


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name was put there by an adapter."""
    return "lora_" in name or ".modules_to_save." in name


def all_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every tensor that stays on the device: parameters, buffers, and the statistics of packed weights, by name."""
    away = {id(table) for table in host_tables(model)}
    found: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    found = [(name, tensor) for name, tensor in found if id(tensor) not in away]
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                found += [(f"{name}.{key}", value) for key, value in vars(part).items() if isinstance(value, Tensor)]
    return found
