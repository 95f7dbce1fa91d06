"""What a recipe trains with, built in the order of its making: data, model, optimizer, loader, step."""

from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console

from lowprec.activations import keep_activations
from lowprec.attention import attend_without_masks, mask_note
from lowprec.config import Recipe
from lowprec.data import StepLoader, fit_to_model, prepare_data
from lowprec.layers.host_embedding import keep_on_host, unpin_tables
from lowprec.model import COMPUTE_DTYPE, load_model, load_tokenizer
from lowprec.optim import AdamW
from lowprec.optim.options import build_schedule
from lowprec.plan.settle import Choice, RowLengths, settle_on
from lowprec.prepare import wrap
from lowprec.profiling.probe import Probes
from lowprec.run_folder import RunFolder
from lowprec.train.batch_size import graphs_to_come, settle_batch_size
from lowprec.train.calibration import calibration_batch
from lowprec.train.compile import compile_layers
from lowprec.train.options import AUTO
from lowprec.train.recorder import Recorder
from lowprec.train.resume import choices_to_json, stored_choices, stored_graphs
from lowprec.train.state import TrainState
from lowprec.train.step import TrainStep


class Built:
    """The parts of a run: ``build`` makes them, ``close`` gives back what outlives their use."""

    def __init__(self, recipe: Recipe, folder: RunFolder, accelerator: Accelerator, console: Console) -> None:
        self.recipe, self.folder, self.accelerator, self.console = recipe, folder, accelerator, console
        self.recorder = Recorder(recipe, folder, accelerator, console)
        self.model: Any = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.progress: dict[str, Any] = {
            "step": 0,
            "trained_tokens": 0,
            "eval_loss_before": None,
            "eval_loss": None,
            "eval_step": 0,
            "answers_before": [],
            "answers": [],
        }

    def build(self) -> None:
        """Everything that the steps need: data, model, optimizer, loader, step."""
        recipe, options, device = self.recipe, self.recipe.train, self.accelerator.device
        set_seed(options.seed)
        self.tokenizer = load_tokenizer(recipe.model)
        with self.console.status("Reading the data") as reading:
            self.data = prepare_data(recipe.data, self.tokenizer, on_progress=reading.update)
        self.console.print(self.data.summary)
        choice = self._settle()
        self.model = load_model(recipe.model)
        packed = COMPUTE_DTYPE[recipe.model.dtype] if recipe.data.packing else None
        choice = choice.checked(self.model, device, packed)
        if options.cuda_graphs == AUTO:
            options.cuda_graphs = choice.graphs  # so that the recipe stored with the run says how rows were padded
        attend_without_masks(self.model, recipe.data.max_length + options.sample_max_new_tokens)
        calibration = calibration_batch(recipe.wrap, self.data, self.tokenizer.pad_token_id, device)
        if calibration is not None:
            self.model.to(device)  # it runs once as it is
        layers = wrap(
            self.model,
            recipe.weights,
            rules=recipe.wrap.schemes(recipe.weights),
            calibration=calibration,
            frozen=recipe.choice("adapter") != "none",
            device=device,
            use_liger_kernel=options.use_liger_kernel,
            in_graphs=choice.graphs,
            choices=stored_choices(self.folder.resume_from) if self.folder.resume_from else None,
        )
        self.layers = layers
        self.progress["choices"] = choices_to_json(layers.choices)
        self.progress["layers"] = {row.name: row.scheme for row in layers.rows}
        plain = [f"All {len(layers.rows)} linear layers stay in {recipe.model.dtype}.", *layers.fused_lines()]
        self.console.print(layers if layers.converted else "\n".join(plain), markup=False, highlight=False)
        self.model = recipe.adapter.attach(self.model)
        self._use_cache = self.model.config.use_cache
        self.model.config.use_cache = False  # of no use in training; put back in what is saved
        self.activations = keep_activations(
            self.model, choice.policy, choice.why, graphs=choice.graphs, no_graphs=choice.no_graphs
        )
        self.console.print(self.activations.told(), markup=False, highlight=False)
        offloaded = [keep_on_host(self.model, device)] if options.offload_embeddings else []
        self.model.to(device).train()
        fused = recipe.adapter.fuse(self.model)
        if fused is not None:
            self.console.print(fused.summary(), markup=False, highlight=False)
            self.recorder.facts["lora"] = fused.to_dict()
        data_notes = fit_to_model(self.data, self.model)
        masks = mask_note(self.model, recipe.data.max_length)
        data_notes += [masks] if masks else []
        self.optimizer = recipe.optimizer.build(self.model, recipe.state_store)
        if options.torch_compile:
            layers_compiled = compile_layers(self.model)
            self.console.print(f"{layers_compiled} decoder layers are compiled in the first steps.", highlight=False)
        self.wrapped = self.accelerator.prepare_model(self.model)
        self.loader = self._loader()
        if options.find_batch_size:
            to_come = graphs_to_come(choice.of(recipe), self.model.config, self.console.print)
            found = settle_batch_size(
                recipe, self.folder.resume_from, self.wrapped, self.loader, self.accelerator, to_come
            )
            if found is not None:
                self.recorder.facts["find_batch_size"] = asdict(found)
                self.console.print(found.told(), highlight=False)
            self.loader = self._loader()
        self.num_steps = options.max_steps or self.loader.num_steps(options.num_train_epochs)
        self.schedule = build_schedule(self.optimizer, recipe.optimizer, self.num_steps)
        self.state = TrainState(self.model, self.optimizer, self.schedule, self.loader, recipe, self.progress)
        self._update_in_backward()
        prepared_optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        self.step = TrainStep(self.wrapped, prepared_optimizer, self.schedule, self.accelerator, options.max_grad_norm)
        self.probes = Probes([self.step.phases] if recipe.profile.in_training else [])
        notes = offloaded + data_notes + recipe.optimizer.warnings(self.model, recipe.state_store)
        notes += getattr(self.optimizer, "notes", [])
        for note in notes:
            self.console.print(f"[yellow]Note:[/] {note}", highlight=False)
        # The scheme that leaves a layer alone is called bf16; what such a layer computes in is model.dtype.
        counts = {recipe.model.dtype if name == "bf16" else name: n for name, n in layers.counts().items()}
        self.recorder.facts.update(layers=counts, wrap=layers.to_dict(), notes=notes)

    def close(self) -> None:
        """Give back the optimizer's store and pinned embeddings: memory, files and locks, which Python might keep."""
        if isinstance(self.optimizer, AdamW):
            self.optimizer.close()
        if self.model is not None:
            unpin_tables(self.model)

    def _settle(self) -> Choice:
        """What is kept for backward, and whether layers are replayed: as the checkpoint has it, or chosen now."""
        options, checkpoint = self.recipe.train, self.folder.resume_from
        if options.cuda_graphs == AUTO and checkpoint is not None:
            options.cuda_graphs = stored_graphs(checkpoint)
        data, against = self.recipe.data, ""
        if self.accelerator.num_processes > 1:
            against = "several processes train, and auto decides for one alone"
        pads = not data.packing and data.padding(few_shapes=True) != data.padding(few_shapes=False)
        weighed = self._row_lengths if pads else None
        return settle_on(self.recipe, self.accelerator.device, row_lengths=weighed, against_graphs=against)

    def _row_lengths(self) -> RowLengths:
        plain, padded = (self._loader(few_shapes).mean_row_length for few_shapes in (False, True))
        return None if plain is None or padded is None else (plain, padded)

    def _loader(self, few_shapes: bool | None = None) -> StepLoader:
        """
        Args:
            few_shapes: whether rows are padded for graphs; by default as was settled.
        """
        options = self.recipe.train
        few_shapes = bool(options.cuda_graphs) if few_shapes is None else few_shapes
        return StepLoader(
            self.data,
            per_device_batch_size=options.per_device_train_batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            seed=options.seed,
            pad_token_id=self.tokenizer.pad_token_id,
            pad_to_multiple_of=self.recipe.data.padding(few_shapes),
            device=self.accelerator.device,
        )

    def _update_in_backward(self) -> None:
        """Where nothing needs all gradients at once, free each as soon as its weight is updated."""
        options = self.recipe.train
        alone = options.gradient_accumulation_steps == 1 and self.accelerator.num_processes == 1
        if not isinstance(self.optimizer, AdamW):
            return
        if options.max_grad_norm is None and alone:
            self.activations.update_in_backward(self.optimizer)
        elif self.recipe.choice("state_store") != "gpu":
            why = f"train.max_grad_norm={options.max_grad_norm} clips by the exact norm of all gradients"
            if options.max_grad_norm is None:
                why = "gradients are summed over micro-batches or processes"
            self.console.print(
                f"Updates start after backward, because {why}. With train.max_grad_norm=null, accumulation 1 and one "
                "process they overlap with backward, and each gradient is freed at once.",
                highlight=False,
            )
