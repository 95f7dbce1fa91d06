"""``lowprec profile RECIPE``: a recipe's own steps, measured and looked into. Running out of memory is a result."""

import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lowprec.config import Recipe
from lowprec.errors import UserError
from lowprec.machine.cards import CONTEXT_MIB
from lowprec.plan import plan
from lowprec.profiling.alive import Alive, Timeline
from lowprec.profiling.figures import GIB
from lowprec.profiling.folder import check_free, free_folder, write
from lowprec.profiling.limit import limited
from lowprec.profiling.phases import Phases
from lowprec.profiling.session import HISTORY, KERNELS, MEASURED, MEMORY, WARM_UP, Session
from lowprec.profiling.table import gib
from lowprec.run_folder import RunFolder
from lowprec.train.batch_size import find_batch_size, states_to_come
from lowprec.train.interrupt import StopRequest
from lowprec.train.launch import start_accelerator
from lowprec.train.loop import Run
from lowprec.train.out_of_memory import remedies

_SAID = {
    WARM_UP: "warming up",
    MEASURED: "measuring",
    MEMORY: "following the memory of one step, operator by operator",
    KERNELS: "tracing the kernels of one step",
    HISTORY: "recording the allocator's history of one step",
}


def profile_recipe(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Profile a recipe, print the table and leave its folder.

    Args:
        recipe: as ``lowprec.config.resolve`` returns it; nothing is trained that anyone keeps.

    Returns:
        What ``profile.json`` says.

    Raises:
        UserError: as training would; the folder is not empty; several processes; a limit that cannot be.
    """
    accelerator, note = start_accelerator(recipe)
    if accelerator.num_processes > 1:
        raise UserError("lowprec profile measures one process: start it without accelerate launch.")
    folder = Path(recipe.profile.output_dir) if recipe.profile.output_dir else free_folder(recipe.name)
    check_free(folder)
    if note is not None:
        console.print(note, highlight=False)
    recipe.train.resume_from_checkpoint = None
    with limited(accelerator.device, recipe.profile.vram_limit_gib) as told:
        run = Run(recipe, RunFolder(folder, None, messages=[]), accelerator, console, StopRequest())
        try:
            session, failure = _measure(run, console)
        finally:
            run.close()
            accelerator.end_training()
    if failure is not None:
        _advise(failure, recipe, accelerator.device)
    figures = session.figures() | {
        "name": recipe.name,
        "recipe": recipe.to_yaml(),
        "vram_limit_gib": recipe.profile.vram_limit_gib,
        "layers": run.recorder.facts["layers"],
        "out_of_memory": failure,
    }
    figures["notes"] += [*([told] if told else []), *run.recorder.facts["notes"]]
    figures["notes"] += ["The loss was not finite, so the updates were left out."] if session.bad else []
    write(figures, folder, files=sorted(session.folder.iterdir()))
    console.print(session)
    for line in [*figures["notes"], *(failure or {}).get("told", [])]:
        console.print(line, highlight=False, markup=False)
    console.print(f"{folder}/profile.html has the plots, {folder}/profile.json the figures.", highlight=False)
    return figures


def _measure(run: Run, console: Console) -> tuple[Session, dict[str, Any] | None]:
    """The session, complete; or as far as it came, and what is to be said of the memory that ran out."""
    options = run.recipe.profile
    try:
        run.build()
    except torch.OutOfMemoryError:
        session = Session(
            run.model, run.optimizer, device=run.accelerator.device, name=run.recipe.name,
            warmup_steps=options.warmup_steps, steps=options.steps,
        )  # fmt: skip
        session.ran_out_of_memory = True
        return session, _failure(run, "while the model was loaded and converted", None)
    session = Session(
        run.model,
        run.optimizer,
        device=run.accelerator.device,
        phases=run.step.phases,
        warmup_steps=options.warmup_steps,
        steps=options.steps,
        name=run.recipe.name,
        grid_g_co2e_per_kwh=run.recipe.train.grid_g_co2e_per_kwh,
    )
    batch = None
    recording_s: dict[str, float] = {}
    try:
        with session:
            for batch in run.loader:
                recording_s.setdefault(session.stage, run.activations.recording_s)
                _say(session, console)
                if session.stage == MEMORY:  # who looks at every operation sees the ordinary path, with its memory
                    run.activations.forget_graphs()
                counts = {"tokens": batch.num_tokens_global, "trained_tokens": batch.num_trained_tokens_global}
                with session.step(**counts, padding=batch.num_padding):
                    scalars = run.step(batch, stop=False)
                if session.done:
                    break
        session.bad = scalars.read()[2]
        recorded = recording_s[KERNELS] - recording_s[MEASURED]
        if recorded > 0:
            run.recorder.facts["notes"].append(
                f"Recording layers as CUDA graphs took {recorded:.1f} s of the measured steps, in which shapes of "
                "batches came for the third time: more profile.warmup_steps leave it out."
            )
        return session, None
    except torch.OutOfMemoryError:
        where = f"in step {session.num_steps + 1} ({_SAID.get(session.stage, '')})"
    run.model.zero_grad(set_to_none=True)
    if session.timeline is None:
        session.timeline = _follow_again(run, batch)
    length = max(inputs["input_ids"].shape[1] for inputs in batch.micro_batches) if batch is not None else None
    return session, _failure(run, where, session.timeline, session.num_steps, length)


def _say(session: Session, console: Console) -> None:
    """A line at the beginning of each stage."""
    place = session.num_steps - session.warmup_steps
    if session.num_steps == 0 or place == 0 or place >= session.steps:
        many = {WARM_UP: session.warmup_steps, MEASURED: session.steps}.get(session.stage)
        console.print(f"{_SAID[session.stage].capitalize()}{f': {many} steps' if many else ''}", highlight=False)


def _follow_again(run: Run, batch: Any) -> Timeline:
    """Take the step that ran out of memory once more, and follow who holds what until it does."""
    run.activations.forget_graphs()
    if run.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    run.step.phases = Phases(run.accelerator.device)
    alive = Alive(run.accelerator.device, run.model, run.optimizer)
    run.step.phases.listeners.append(alive.enter_phase)
    run.step.phases.on_step_start()
    with suppress(torch.OutOfMemoryError), alive:
        run.step(batch, stop=False)
    run.model.zero_grad(set_to_none=True)
    return Timeline.of(alive)


def _failure(
    run: Run, where: str, timeline: Timeline | None, steps_done: int = 0, length: int | None = None
) -> dict[str, Any]:
    """What ran out where, who held the memory, and which change would have fitted.

    Args:
        length: tokens of the longest rows of the step, padded; None where no step was taken.
    """
    found: dict[str, Any] = {
        "where": where, "told": [f"Memory ran out {where}."], "fits": None, "row_length": length
    }  # fmt: skip
    if timeline is not None:
        parts = sorted(timeline.parts().items(), key=lambda part: -part[1])
        held = ", ".join(f"{kind} {gib(size / GIB)}" for kind, size in parts if size > 2**16)
        found["told"].append(f"What was alive: {held}.")
        train = run.recipe.train
        effective = train.per_device_train_batch_size * train.gradient_accumulation_steps
        with suppress(torch.OutOfMemoryError):
            # The optimizer's states are there from the first step on.
            to_come = 0 if steps_done else states_to_come(run.recipe, run.model)
            tried = find_batch_size(run.wrapped, run.loader, run.accelerator, effective, lambda rows: to_come)
            found["fits"] = {
                "train.per_device_train_batch_size": tried.batch_size,
                "train.gradient_accumulation_steps": tried.accumulation,
            }
            change = " ".join(f"{key}={value}" for key, value in found["fits"].items())
            found["told"].append(f"Tried, and it fits, with the same effective batch: {change}.")
        if not found["fits"]:
            found["told"].append("Tried: not even a micro-batch of one sample fits.")
    return found


def _advise(failure: dict[str, Any], recipe: Recipe, device: torch.device) -> None:
    """Add what each single change is predicted to save; where that cannot be predicted, the usual remedies."""
    limit = recipe.profile.vram_limit_gib
    if device.type == "cuda":
        limit = limit or torch.cuda.get_device_properties(device).total_memory / GIB
    elif limit is not None:
        limit += CONTEXT_MIB / 1024  # the simulated limit is of tensors alone, and a plan counts a context
    length = failure["row_length"] or recipe.data.max_length
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "as_profiled.yaml")
            file.write_text(recipe.to_yaml(), encoding="utf-8")
            changes = plan(str(file), [f"data.max_length={length}", "profile.vram_limit_gib=null"], vram=limit).advice
    except UserError as error:
        failure["advice"] = []
        usual = "; ".join(remedies(recipe))
        failure["told"].append(f"What lowers the memory, the cheapest first: {usual}. No prediction: {error}")
        return
    failure["advice"] = [asdict(change) for change in changes]
    if not changes:
        failure["told"].append("No change of a single key is predicted to lower the memory.")
        return
    failure["told"].append(f"Predicted for rows of {length} tokens, each change by itself:")
    for change in changes:
        keys = " ".join(filter(None, (f"{change.key}={change.value}", change.also)))
        fits = "fits" if change.fits else "does not suffice"
        failure["told"].append(f"{keys} saves {gib(change.saves_gib)} and {fits}")
