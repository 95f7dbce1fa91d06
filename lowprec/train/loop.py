"""``train(recipe)``: a run from a resolved recipe to its folder, readable top to bottom."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from lowprec.checkpoint import atomic_folder, is_disk_full, prune, require_space
from lowprec.config import Recipe
from lowprec.data import StepBatch
from lowprec.display import Display, make_console
from lowprec.errors import UserError
from lowprec.model import COMPUTE_DTYPE
from lowprec.optim import AdamW
from lowprec.optim.options import follows_loss
from lowprec.profiling.limit import limited
from lowprec.report import dtypes, peak_memory
from lowprec.run_folder import RunFolder, Status
from lowprec.train.built import Built
from lowprec.train.clock import Mark
from lowprec.train.compile import compile_seconds
from lowprec.train.evaluation import answer, evaluate
from lowprec.train.interrupt import StopRequest, stop_on_signals
from lowprec.train.launch import claim_run_folder, start_accelerator
from lowprec.train.nonfinite import NonFiniteError, find_origin
from lowprec.train.out_of_memory import OutOfMemoryError, explain
from lowprec.train.resume import check_same_layers, check_same_run, nothing_to_do
from lowprec.train.state import random_state, trainable
from lowprec.train.step import StepScalars


def train(recipe: Recipe, console: Console | None = None) -> Status:
    """Run a recipe and leave its run folder.

    Args:
        recipe: as ``lowprec.config.resolve`` returns it.
        console: where to print; standard output by default.

    Returns:
        FINISHED, or INTERRUPTED where a signal asked to stop and a checkpoint was saved.

    Raises:
        UserError: bad data, model or folder; a loss that is not finite; not enough memory; a full disk.
    """
    accelerator, note = start_accelerator(recipe)
    console = (console or make_console()) if accelerator.is_main_process else Console(quiet=True)
    folder = claim_run_folder(recipe, accelerator)
    if note is not None:
        console.print(note, highlight=False)
    if folder is None:
        console.print(nothing_to_do(recipe), markup=False)
        return Status.FINISHED
    try:
        with stop_on_signals() as stop, limited(accelerator.device, recipe.profile.vram_limit_gib) as told:
            if told is not None:
                console.print(told, markup=False, highlight=False)
            return Run(recipe, folder, accelerator, console, stop).execute()
    finally:
        accelerator.end_training()
        folder.close()


@dataclass
class _Pending:
    """A step whose work is under way, with all that is needed to report it or to take it again."""

    batch: StepBatch
    random_state: dict[str, Any]
    row: dict[str, Any]
    begin: Mark
    scalars: StepScalars


class Run(Built):
    """One run: what was built from the recipe, and the loop over it."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, accelerator: Accelerator, console: Console, stop: StopRequest
    ) -> None:
        super().__init__(recipe, folder, accelerator, console)
        self.stop = stop
        self._has_begun = False
        self._trained_s = 0.0

    def execute(self) -> Status:
        """Build, resume or begin, take the steps, save what is due, report."""
        for message in self.folder.messages:
            self.console.print(message, markup=False)
        try:
            self.build()
            self._describe()
            self._begin()
            with Display(self.console, self.progress["step"], self.num_steps) as self.display:
                stopped = self._take_steps()
            if not stopped:
                self._save_final()
            self._describe()
        except BaseException as error:
            if self._has_begun:  # before that nothing is written, so that the mended command can use the folder
                with suppress(OSError):  # a full disk must not hide what went wrong
                    self.recorder.report(Status.FAILED, self.progress, error=f"{type(error).__name__}: {error}")
            if is_disk_full(error) and not isinstance(error, UserError):
                last = self.recorder.last_checkpoint()
                raise UserError(
                    f"The disk of train.output_dir={self.folder.path} is full. "
                    f"{f'{last} stays usable.' if last else 'There is no checkpoint yet.'}"
                ) from error
            if isinstance(error, torch.OutOfMemoryError):
                raise OutOfMemoryError(explain(self.recipe, self.model, self.optimizer)) from error
            raise
        finally:
            self.close()
        status = Status.INTERRUPTED if stopped else Status.FINISHED
        report = self.recorder.report(status, self.progress)
        if stopped:
            self.console.print(
                f"Stopped after step {self.progress['step']} as asked. {self.recorder.last_checkpoint()} is saved; the "
                "same command with train.resume_from_checkpoint=auto goes on from it.",
                markup=False,
            )
        else:
            self.recorder.finish(report, [(p.question, p.reference) for p in self.data.prompts])
        return status

    def _describe(self) -> None:
        """Put into the report what grows with the steps: the states, their traffic, and what a stream has read."""
        assert self.optimizer is not None
        facts = self.recorder.facts
        summary = self.data.summary
        if summary.padding_share is None:
            summary.padding_share = self.loader.padding_share
        facts["data"] = summary.to_dict()
        facts["activations"] = self.activations.to_dict()
        if self.recipe.train.torch_compile:
            facts["compile_s"] = compile_seconds()
        facts["dtypes"] = dtypes(self.model, self.optimizer, COMPUTE_DTYPE[self.recipe.model.dtype])
        if self._trained_s and self.probes.probes:
            facts["probe_cost_share"] = round(self.probes.host_s / self._trained_s, 5)
        if isinstance(self.optimizer, AdamW):
            facts["optimizer"] = self.optimizer.statistics(self.num_steps)

    def _begin(self) -> None:
        checkpoint = self.folder.resume_from
        if checkpoint is not None:
            for message in check_same_run(self.recipe, checkpoint):
                self.console.print(message, markup=False)
            check_same_layers(self.layers, checkpoint)
            self.state.load(checkpoint, self.accelerator)
            if self.progress["step"] > self.num_steps:
                raise UserError(
                    f"{checkpoint} has {self.progress['step']} steps behind it, more than this run's {self.num_steps}: "
                    "set train.max_steps to at least that."
                )
            self.console.print(f"Resuming after step {self.progress['step']} from {checkpoint}.", markup=False)
        else:
            require_space(self.folder.final, self._bytes_to_save(), "Nothing is trained yet.")
        self._has_begun = True
        self.recorder.begin(self.progress["step"])
        self.recorder.report(Status.RUNNING, self.progress)

    def _bytes_to_save(self) -> int:
        """Of ``final/``, and of the first checkpoint where some are to be written."""
        weights = sum(tensor.nbytes for tensor in trainable(self.model).values())
        if self.recipe.train.save_steps is None:
            return weights
        states = 0
        if isinstance(self.optimizer, AdamW) and self.recipe.choice("state_store") != "ssd":  # which has taken its room
            states = int(self.optimizer.statistics()["states_gib"] * 2**30)
        return 2 * weights + states

    def _take_steps(self) -> bool:
        """Train until the last step, or until all processes know that one was asked to stop: then return True.

        A step's scalars are read while the next step runs, so that the device never waits for the host.
        """
        options = self.recipe.train
        if self.progress["eval_loss_before"] is None:
            self._evaluate()
            self.progress.update(eval_loss_before=self.progress["eval_loss"], answers_before=self.progress["answers"])
        pending: _Pending | None = None
        mark = Mark(self.accelerator.device)
        self.step.phases.begin(mark)
        for batch in self.loader:
            step = self.progress["step"] + 1
            if step > self.num_steps:
                break
            previous, pending = pending, self._launch(step, batch, mark)
            mark = pending.scalars.end
            stopping = self._finish(previous) if previous else False
            last = step == self.num_steps
            due_eval = last or (options.eval_steps is not None and step % options.eval_steps == 0)
            due_save = options.save_steps is not None and (last or step % options.save_steps == 0)
            # With several processes the others learn of a signal from the scalars; alone, there is no need to wait.
            stopping |= bool(self.stop) and self.accelerator.num_processes == 1
            if due_eval or due_save or stopping:
                self._finish(pending)
                pending = None
                if due_eval:
                    self._evaluate()
                if due_save or stopping:
                    self._save_checkpoint()
                if stopping and not last:
                    return True
                mark = Mark(self.accelerator.device)
                self.step.phases.begin(mark)
        return False

    def _launch(self, step: int, batch: StepBatch, begin: Mark) -> _Pending:
        chance, learning_rate = random_state(), self.schedule.get_last_lr()[0]
        self.probes.on_step_start()
        scalars = self.step(batch, stop=bool(self.stop))
        self.progress["step"] = step
        self.progress["trained_tokens"] += batch.num_trained_tokens_global
        row = {
            "step": step,
            "epoch": round(batch.epoch, 4),
            "learning_rate": learning_rate,
            "trained_tokens": self.progress["trained_tokens"],
        }
        return _Pending(batch, chance, row, begin, scalars)

    def _finish(self, pending: _Pending) -> bool:
        """Wait for a step, write its row of metrics; True where a process was asked to stop."""
        with self.step.phases.waiting():
            loss, grad_norm, bad, stop = pending.scalars.read()
        if bad:
            self._fail(pending, loss, grad_norm)
        seconds = pending.scalars.end.seconds_since(pending.begin)
        self._trained_s += seconds
        row = pending.row | {
            "loss": loss,
            "grad_norm": grad_norm,
            "tokens_per_second": round(pending.batch.num_trained_tokens_global / seconds, 1),
            "all_tokens_per_second": round(pending.batch.num_tokens_global / seconds, 1),
            "step_time_ms": round(seconds * 1000, 2),
            **self.probes.on_step_end(),
            **peak_memory(),
        }
        self.recorder.row(row)
        self.display.step(row)
        return stop

    def _fail(self, pending: _Pending, loss: float, grad_norm: float) -> None:
        self.progress["step"] = pending.row["step"] - 1
        self.activations.forget_graphs()
        applied = "It was not applied to the weights."
        if isinstance(self.optimizer, AdamW):
            self.optimizer.stop_updates_in_backward()
            if self.optimizer.grad_norm is not None:
                applied = "Weights whose gradients came before it in that backward were updated (max_grad_norm=null)."
        else:
            applied = "The weights moved by the remaining momentum at most."
        origin = find_origin(self.model, pending.batch, pending.random_state, self.accelerator)
        raise NonFiniteError(
            f"Step {pending.row['step']} is not finite (loss {loss}, gradient norm {grad_norm}): it arose in the "
            f"{origin}. {applied} The last good checkpoint: "
            f"{self.recorder.last_checkpoint() or 'none, train.save_steps was not reached'}. A lower "
            "optimizer.learning_rate, a longer optimizer.warmup_ratio, or a look at the samples of that step may help."
        )

    def _evaluate(self) -> None:
        options = self.recipe.train
        loss = evaluate(self.wrapped, self.data, options, self.tokenizer.pad_token_id, self.accelerator)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The held-out loss at step {self.progress['step']} is {loss}: the model gives no finite logits for "
                "some held-out sample. Look at the weights it starts from, and at model.dtype."
            )
        self.progress.update(eval_loss=loss, eval_step=self.progress["step"])
        if follows_loss(self.schedule):
            self.schedule.step(loss)
        if self.accelerator.is_main_process:
            self.progress["answers"] = [
                answer(self.model, self.tokenizer, prompt.input_ids, options.sample_max_new_tokens, self.accelerator)
                for prompt in self.data.prompts[: options.num_sample_answers]
            ]
        self.recorder.row({"step": self.progress["step"], "eval_loss": loss})
        self.recorder.flush()
        self.display.note(f"step {self.progress['step']}: held-out loss {loss:.4f}")

    def _save_checkpoint(self) -> None:
        self.recorder.flush()  # the rows up to a checkpoint are not taken again
        last = self.recorder.last_checkpoint()
        keeps = f"{last} stays usable." if last else "There is no older checkpoint."
        saved = self.folder.checkpoints / f"step-{self.progress['step']}"
        self.state.save(saved, self.accelerator, keeps)
        if self.accelerator.is_main_process:
            prune(saved, self.recipe.train.save_total_limit)

    def _save_final(self) -> None:
        if self.accelerator.is_main_process:
            last = self.recorder.last_checkpoint()
            needed = sum(tensor.nbytes for tensor in trainable(self.model).values())
            keeps = f"{last} stays usable." if last else ""
            self.model.config.use_cache = self._use_cache
            with atomic_folder(self.folder.final, needed_bytes=needed, keeps=keeps) as writing:
                self.recipe.adapter.save(self.model, writing, self.recipe.model)
                self.tokenizer.save_pretrained(writing)
        self.accelerator.wait_for_everyone()
