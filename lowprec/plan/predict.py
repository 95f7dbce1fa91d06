"""``predict``: what a recipe will take on a machine, by a trace of one step; a ``Planner`` keeps what it has traced."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from lowprec.attention import WINDOWS, head_dim, why_no_flash_of
from lowprec.config import Recipe
from lowprec.errors import UserError
from lowprec.machine import Machine, named_card
from lowprec.model import AUTO, Model, load_config
from lowprec.model_source import ModelSource, resolve_source
from lowprec.optim.backward import SMALL, TOGETHER
from lowprec.optim.options import AdamWOptions
from lowprec.plan.allocator import CachingAllocator
from lowprec.plan.follow import cublas_workspace
from lowprec.plan.graphs import in_graphs, with_graphs
from lowprec.plan.ledger import Peak, peak_of
from lowprec.plan.model import of_template, period_of
from lowprec.plan.states import States, Trained, states_of
from lowprec.plan.step import TracedRecipe, updates_in_backward
from lowprec.plan.tape import KINDS, Event, NotUniformError, Stretched, Tape, Template
from lowprec.plan.timing import StepTime, step_time
from lowprec.train.options import Train

GIB = 2**30
PARTS = (*KINDS, "slack", "context")
UNKNOWN_CARD = "RTX 4060"
"""Whose kernels are assumed where no card is known: its generation decides between kernels, not its size."""

CALLS_TOGETHER = 6
"""Of an update in backward of many small parameters: their norms, copied to their places, put together and looked at;
and the update, with its table. One that comes after backward updates all of them so."""

NOT_TRACED = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "seed",
    "eval_steps", "eval_max_samples", "num_sample_answers", "save_steps", "save_total_limit", "report_to",
)  # fmt: skip
"""Keys of ``train`` that say nothing of one step."""
_ANY_TRAIN = Train()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Bytes, unless the name says otherwise. Of one GPU and one process."""

    rows: int
    length: int
    peak: Peak
    reserved: int
    """What the caching allocator holds at most."""
    context: int
    """What the process holds beside that: CUDA's context and kernels."""
    ram: int
    disk: int
    states: States
    time: StepTime | None
    """None where no machine is known."""
    tokens_per_second: float | None
    energy_j: float | None
    """Of a step, by the board's limit."""
    schemes: dict[str, int]
    """Scheme -> linear layers."""

    @property
    def total(self) -> int:
        return self.reserved + self.context

    @property
    def parts(self) -> dict[str, int]:
        """What ``total`` is made of, by kind."""
        return self.peak.parts | {"slack": self.reserved - self.peak.allocated, "context": self.context}


@dataclass(frozen=True, slots=True)
class _Traced:
    """One step of a recipe with micro-batches of one size."""

    recipe: TracedRecipe
    tape: Tape | Stretched
    offloaded_bytes: int
    """By one micro-batch, in the layers that were traced."""


def model_config(options: Model) -> Any:
    """The model's configuration; its weights need not be there.

    Raises:
        UserError: there is none, or it is of no causal language model.
    """
    folder = Path(options.model_name_or_path).expanduser()
    if (folder / "config.json").is_file():
        return load_config(options, ModelSource("folder", options.model_name_or_path, folder.resolve()))
    return load_config(options, resolve_source(options.model_name_or_path))


class Planner:
    """Predictions for one model on one machine.

    Args:
        machine: None where none is known: then there are no times, and the kernels are those of ``UNKNOWN_CARD``.
    """

    def __init__(self, config: Any, machine: Machine | None):
        self.config, self.machine = config, machine
        self._card = machine or named_card(UNKNOWN_CARD)
        self._depth = config.get_text_config().num_hidden_layers
        self._template = Template(self._depth, period_of(config))
        self.vocab_size: int = config.get_text_config().vocab_size
        self._traced: dict[str, TracedRecipe] = {}
        self._whole: set[str] = set()
        self._tapes: dict[tuple[str, int, int], _Traced] = {}
        self._memories: dict[tuple[str, int, int, bool], tuple[Peak, int]] = {}

    def predict(self, recipe: Recipe, rows: int | None = None, length: int | None = None) -> Prediction:
        """One optimizer step with micro-batches of ``rows`` times ``length`` tokens, by default the recipe's.

        Raises:
            UserError: the recipe does not suit the model.
        """
        rows = rows or recipe.train.per_device_train_batch_size
        length = length or recipe.data.max_length
        recipe = self._settled(replace(recipe, data=replace(recipe.data, max_length=length)))
        return self._predict(recipe, rows, length)

    def at_rest(self, recipe: Recipe) -> int:
        """Bytes that the process holds before the first token at least: weights, states and context. No step is traced.

        Raises:
            UserError: as ``predict``.
        """
        return self._memory(self._settled(recipe), 0, 0)[0].allocated + self._context

    def why_no_flash(self, recipe: Recipe) -> str | None:
        """Why this card's FlashAttention does not compute the model's attention; None where it does."""
        dim, dtype = head_dim(self.config.get_text_config()), self._settled(recipe).model.torch_dtype
        return why_no_flash_of(dim, dtype, self._card.capability or (0, 0))

    @property
    def _context(self) -> int:
        return int(self._card.context_mib * 2**20)

    def _found(self, recipe: Recipe, rows: int, length: int) -> "_Traced":
        key = self.key(recipe)
        if (key, rows, length) not in self._tapes:
            self._tapes[key, rows, length] = self._trace(recipe, self._step_key(recipe), rows, length)
        return self._tapes[key, rows, length]

    def _settled(self, recipe: Recipe) -> Recipe:
        if recipe.model.dtype != AUTO:
            return recipe
        native = (self._card.capability or (0, 0)) >= (8, 0)
        return replace(recipe, model=replace(recipe.model, dtype="bf16" if native else "fp32"))

    def key(self, recipe: Recipe) -> str:
        """What a prediction depends on beside the size of the batch: neither for how long nor with which data it is
        trained."""
        optimizer = replace(recipe.optimizer, learning_rate=1.0, warmup_ratio=0.0)
        return repr((self._step_key(recipe), optimizer, recipe.state_store))

    def _step_key(self, recipe: Recipe) -> str:
        """What the traced step depends on, in which no states of an optimizer take part."""
        more = min(recipe.train.gradient_accumulation_steps, 2)
        untold = {name: getattr(_ANY_TRAIN, name) for name in NOT_TRACED}
        # Graphs repeat the same step; what is measured before it is compared with them or without.
        measures = any(
            getattr(s, "chooses", False) for s in (recipe.weights, *recipe.wrap.schemes(recipe.weights).values())
        )
        graphs = measures and in_graphs(recipe)
        train = replace(recipe.train, gradient_accumulation_steps=more, cuda_graphs=graphs, **untold)
        recipe = self._settled(recipe)
        groups = recipe.model, recipe.weights, recipe.wrap, recipe.adapter, isinstance(recipe.optimizer, AdamWOptions)
        # Windows shorter than the samples decide what attention computes.
        text, longest = self.config.get_text_config(), recipe.data.max_length + recipe.train.sample_max_new_tokens
        windows = [window for name in WINDOWS if isinstance(window := getattr(text, name, None), int)]
        return repr((*groups, train, [window < longest for window in windows]))

    def _trace(self, recipe: Recipe, key: str, rows: int, length: int) -> "_Traced":
        few = self._depth > self._template.num_layers and key not in self._whole
        if key not in self._traced:
            config = of_template(self.config, self._template) if few else self.config
            self._traced[key] = TracedRecipe(recipe, config, self._card)
        traced = self._traced[key]
        trained = _all_layers(traced, self._template) if few else traced.trained
        tape: Tape | Stretched = traced.trace(rows, length, recipe, trained)
        try:
            if few:
                if self._template.period > 1 and not traced.has_like_layers:
                    raise NotUniformError("the layers of a period are not of one size")
                tape = tape.stretched(self._template)  # type: ignore[union-attr]
            found = _Traced(traced, tape, traced.offloaded_bytes)
            self._read_memory(recipe, found, rows, length)  # the events show whether layers are alike
            return found
        except NotUniformError:
            self._whole.add(key)
            del self._traced[key]
            return self._trace(recipe, key, rows, length)

    def _memory(self, recipe: Recipe, rows: int, length: int) -> tuple[Peak, int]:
        """The peak of a step and what the allocator reserves."""
        key, found = self.key(recipe), self._found(recipe, rows, length)
        if (key, rows, length, in_graphs(recipe)) not in self._memories:
            self._read_memory(recipe, found, rows, length)
        return self._memories[key, rows, length, in_graphs(recipe)]

    def _read_memory(self, recipe: Recipe, found: "_Traced", rows: int, length: int) -> None:
        events = list(found.tape.events())
        self._memories[self.key(recipe), rows, length, in_graphs(recipe)] = self._memory_of(
            recipe, events, rows * length
        )

    def _memory_of(self, recipe: Recipe, events: list[Event], tokens: int) -> tuple[Peak, int]:
        expandable = sys.platform == "linux"  # lowprec switches them on, which PyTorch has there alone
        if not in_graphs(recipe) or not tokens:
            return peak_of(events), CachingAllocator(expandable=expandable).replay(events)
        return with_graphs(
            events,
            recompute=recipe.train.gradient_checkpointing != "none",
            hidden=tokens * self.config.get_text_config().hidden_size * recipe.model.torch_dtype.itemsize,
            workspace=cublas_workspace(self._card.capability),
            expandable=expandable,
        )

    def _predict(self, recipe: Recipe, rows: int, length: int) -> Prediction:
        found = self._found(recipe, rows, length)
        peak, reserved = self._memory(recipe, rows, length)
        traced, tape = found.recipe, found.tape
        trained = traced.trained if isinstance(tape, Tape) else _all_layers(traced, self._template)
        states = states_of(recipe, trained)
        accumulated = recipe.train.gradient_accumulation_steps
        time = tokens = joules = None
        if self.machine is not None:
            weights, traced_weights = (sum(p.numel * p.dtype.itemsize for p in ps) for ps in (trained, traced.trained))
            in_backward = updates_in_backward(recipe)
            # The norm reads gradients, of which the trace has those of its layers after backward; scaling reads and
            # writes them.
            untraced = weights if in_backward else weights - traced_weights
            passes = 1 if recipe.train.max_grad_norm is None else 3
            time = step_time(
                tape,
                self.machine,
                states,
                micro_batches=accumulated,
                update_bytes=3 * weights + 2 * sum(nbytes for _, nbytes in states.device),
                in_backward=in_backward,
                fetched_bytes=rows * length * traced.fetched_bytes,
                offloaded_bytes=found.offloaded_bytes * self._depth / traced.num_layers,
                gradient_bytes=passes * untraced,
                in_graphs=in_graphs(recipe),
                selective=recipe.train.gradient_checkpointing == "selective",
                update_calls=_calls_in_backward(trained, states) if in_backward else 0,
            )
            tokens = rows * length * accumulated / time.total_ms * 1e3
            joules = None if self.machine.power_w is None else self.machine.power_w * time.total_ms / 1e3
        counts = dict(traced.layers.counts())
        scale = self._depth / traced.num_layers
        return Prediction(
            rows=rows,
            length=length,
            peak=peak,
            reserved=reserved,
            context=self._context,
            ram=_ram(recipe, traced.loaded_parameters(self._depth), states, traced.host_bytes),
            disk=_disk(recipe, trained, states),
            states=states,
            time=time,
            tokens_per_second=tokens,
            energy_j=joules,
            schemes={name: _stretched_count(count, scale, traced.num_layers) for name, count in counts.items()},
        )


def _calls_in_backward(trained: list[Trained], states: States) -> int:
    """What updates in backward launch: a norm for each parameter, and an update, unless states come by the chunk."""
    if states.step_chunks:
        return len(trained)
    small = [parameter.numel for parameter in trained if parameter.numel <= SMALL]
    return 2 * (len(trained) - len(small)) + CALLS_TOGETHER * -(-sum(small) // TOGETHER)


def _stretched_count(count: int, scale: float, num_layers: int) -> int:
    """Layers of all depths, and those outside (the head) once."""
    inside = count // num_layers * num_layers
    return round(inside * scale) + count - inside


def _all_layers(traced: TracedRecipe, template: Template) -> list[Trained]:
    """What trains in the deep model."""
    found, prefix = [], traced.followed.prefix
    for parameter in traced.trained:
        layer = traced.followed.layer_of(parameter.name)
        for number in [None] if layer is None else template.layers_of(layer):
            name = parameter.name.replace(f"{prefix}.{layer}.", f"{prefix}.{number}.", 1)
            found.append(replace(parameter, name=name))
    return found


def _ram(recipe: Recipe, loaded_parameters: int, states: States, host_bytes: int) -> int:
    """This process as it is (it has loaded what training loads), and the larger of the model while it is read into
    host memory in ``model.dtype``, and the states that stay there; beside either, the weights that stay pinned, since
    they are copied from the model that was read."""
    loaded = loaded_parameters * recipe.model.torch_dtype.itemsize
    return psutil.Process().memory_info().rss + max(loaded, states.host) + host_bytes


def _disk(recipe: Recipe, trained: list[Trained], states: States) -> int:
    """Checkpoints as many as are kept and the one being written, the final model, and the states of an ssd store."""
    weights = sum(p.numel * p.dtype.itemsize for p in trained)
    in_memory = sum(nbytes for name, nbytes in states.device if name) + (0 if states.disk else states.host)
    options = recipe.train
    count = 0 if options.save_steps is None else (options.save_total_limit or 1) + 1
    return count * (weights + in_memory) + weights + states.disk


def parse_gib(text: str) -> float:
    """``8GiB``, ``8GB``, ``8G`` or ``8`` as GiB (GB are 1e9 bytes).

    Raises:
        UserError: it is none of them.
    """
    plain = text.strip().lower()
    for suffix, factor in (("gib", 1.0), ("gb", 1e9 / GIB), ("mib", 1 / 1024), ("g", 1.0), ("", 1.0)):
        if plain.endswith(suffix):
            try:
                value = float(plain.removesuffix(suffix)) * factor
            except ValueError:
                break
            if 0 < value < float("inf"):
                return value
            break
    raise UserError(f"--vram {text} is no amount of memory: write it as 8GiB.")
