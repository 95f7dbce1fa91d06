"""One training step of a recipe, traced: the model, optimizer and loop of training, over tensors without data."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn

from lowprec.activations.offload import Offload
from lowprec.config import Recipe
from lowprec.layers.decode_buffer import release_decode_buffers
from lowprec.layers.host_embedding import host_tables
from lowprec.machine import Machine
from lowprec.optim.options import AdamWOptions
from lowprec.plan.cuda_like import LikeCuda
from lowprec.plan.follow import Followed, find_layers
from lowprec.plan.model import build_model
from lowprec.plan.operators import know_bitsandbytes, know_lowprec
from lowprec.plan.schemes import lend_once
from lowprec.plan.states import Trained, states_of
from lowprec.plan.tape import Tape
from lowprec.plan.tracker import BACKWARD, FORWARD, UPDATE
from lowprec.plan.without_data import no_data
from lowprec.train.step import TrainStep


class TracedRecipe:
    """A recipe's model of a few layers, built once without data, of which each step of any size is traced once.

    Args:
        config: of the model, with as many layers as shall be traced.

    Raises:
        UserError: as training would, where the recipe does not suit the model.
    """

    def __init__(self, recipe: Recipe, config: Any, machine: Machine):
        self.recipe = recipe
        self._text = config.get_text_config()
        self._modes = no_data(), LikeCuda(machine.capability or (9, 0))
        with self._without_data():
            self.model, self.layers, self._loaded = build_model(recipe, config, machine)
            compute_like_accelerate(self.model, recipe.model.torch_dtype)
        know_lowprec()
        if recipe.choice("weights") == "nf4":
            know_bitsandbytes()
        tables = host_tables(self.model)
        self.host_bytes = sum(table.nbytes for table in tables)
        """Weights that stay in pinned host memory."""
        self.fetched_bytes = sum(table.shape[1] * table.itemsize for table in tables)
        """Of them, what a token's look-up brings to the device."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.trained = [Trained(name, p.numel(), p.dtype) for name, p in named]
        self._parameters = [parameter for _, parameter in named]
        self.followed = Followed(
            self.model,
            self._text.num_hidden_layers,
            self._text.vocab_size,
            machine.capability or (9, 0),
        )
        if updates_in_backward(recipe):
            for parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(_free_gradient)
        functions = {getattr(module, "_gradient_checkpointing_func", None) for module in self.model.modules()}
        self._offloads = [function for function in functions if isinstance(function, Offload)]
        self.model.register_forward_pre_hook(lambda module, args: self.followed.begin(FORWARD))
        self._known: dict[tuple[int, int], tuple[Tape, int]] = {}
        self.offloaded_bytes = 0
        """What one micro-batch of the last trace sent to the host."""

    @contextmanager
    def _without_data(self) -> Iterator[None]:
        with ExitStack() as stack:
            for mode in self._modes:
                stack.enter_context(mode)
            # In its own thread the engine would ask for a device of the kind that it works for.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            yield

    @property
    def num_layers(self) -> int:
        """Layers that are traced."""
        return int(self._text.num_hidden_layers)

    @property
    def has_like_layers(self) -> bool:
        """Whether all layers that are traced have as many parameters."""
        layers = find_layers(self.model, self.num_layers)
        return len({sum(p.numel() for p in layer.parameters()) for layer in layers or ()}) == 1

    def loaded_parameters(self, num_layers: int) -> int:
        """Parameters that a model of ``num_layers`` layers is loaded with."""
        outside, inside = self._loaded
        return outside + inside * num_layers // self.num_layers

    def trace(
        self, rows: int, length: int, recipe: Recipe | None = None, all_trained: list[Trained] | None = None
    ) -> Tape:
        """The last micro-batch and the update of the second optimizer step (the first one makes the states).

        Args:
            rows, length: of the micro-batch; no token is padding, and all of them are trained. With 0 rows no step is
                taken, and the tape holds what is there before one.
            recipe: whose optimizer's states there are, where it is another one that steps alike.
            all_trained: of all layers of a deeper model, whose states decide how large the buffers of a store are.

        Raises:
            UserError: a parameter cannot have states of that format.
        """
        recipe = recipe or self.recipe
        states = [state for state in states_of(recipe, self.trained).device if state[0]]
        states += [state for state in states_of(recipe, all_trained or self.trained).device if not state[0]]
        if (rows, length) not in self._known:
            self._known[rows, length] = self._trace(rows, length), sum(f.sent_bytes for f in self._offloads)
        tape, self.offloaded_bytes = self._known[rows, length]
        return tape.with_states([(self.followed.layer_of(name), nbytes) for name, nbytes in states])

    def _trace(self, rows: int, length: int) -> Tape:
        for function in self._offloads:
            function.sent_bytes = 0
        try:
            with self._without_data():
                buffer = lend_once(self.model)
                if self.recipe.train.gradient_accumulation_steps > 1:  # those of the micro-batches before
                    for parameter in self._parameters:
                        parameter.grad = torch.empty_like(parameter)
                return self.followed.follow(lambda: self._step(rows, length), [] if buffer is None else [buffer])
        finally:
            release_decode_buffers()  # it has no data, and belongs to the whole process

    def _step(self, rows: int, length: int) -> None:
        if not rows:
            return
        recipe, options = self.recipe, self.recipe.train
        optimizer = _Optimizer(self._parameters, takes_flag=isinstance(recipe.optimizer, AdamWOptions))
        if updates_in_backward(recipe):
            optimizer.grad_norm = torch.zeros(())
        accelerator: Any = _Accelerator(self.followed)
        step = TrainStep(self.model, optimizer, SimpleNamespace(step=lambda: None), accelerator, options.max_grad_norm)
        batch: Any = SimpleNamespace(micro_batches=[_inputs(rows, length)], num_trained_tokens_global=rows * length)
        step(batch, stop=False)


class _Accelerator:
    """What ``TrainStep`` asks of Accelerate, for one process, without its global state."""

    num_processes = 1
    device = torch.device("cpu")

    def __init__(self, followed: Followed):
        self._followed = followed

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._followed.begin(BACKWARD)
        (loss / 1).backward()  # the division is Accelerate's, whose own accumulation is not used
        self._followed.begin(UPDATE)

    def clip_grad_norm_(self, parameters: list, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)  # as it comes of itself on CUDA

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def unscale_gradients(self, optimizer: Any) -> None:
        pass


class _Optimizer:
    """In the optimizer's place: its states are laid out beforehand, and its kernels take no memory of their own."""

    grad_norm: Tensor | None = None

    def __init__(self, parameters: list[Tensor], takes_flag: bool):
        self._parameters = parameters
        if takes_flag:
            self.found_inf = None

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _inputs(rows: int, length: int) -> dict[str, Tensor]:
    inputs = {name: torch.zeros(rows, length, dtype=torch.int64) for name in ("input_ids", "labels", "attention_mask")}
    return inputs | {"trained_positions": torch.zeros(rows * (length - 1), dtype=torch.int64)}


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def updates_in_backward(recipe: Recipe) -> bool:
    """As ``lowprec.train.built`` decides, for one process."""
    options = recipe.train
    alone = options.gradient_accumulation_steps == 1
    return isinstance(recipe.optimizer, AdamWOptions) and options.max_grad_norm is None and alone


def compute_like_accelerate(model: Any, dtype: torch.dtype) -> None:
    """Autocast around this instance's forward, and results in fp32, as ``Accelerator.prepare_model`` does it."""
    if dtype == torch.float32:
        return
    own = model.forward
    plain = own.__func__ if isinstance(own, MethodType) else own
    model.forward = MethodType(convert_outputs_to_fp32(torch.autocast("cpu", dtype=dtype)(plain)), model)
