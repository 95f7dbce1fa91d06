"""What has to be settled between processes before a run begins: Accelerate, the run folder, trackers."""

import importlib.util
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import GradScalerKwargs, broadcast_object_list, parse_flag_from_env

from lowprec.allocator import use_expandable_segments
from lowprec.config import Recipe
from lowprec.errors import UserError
from lowprec.model import settle_dtype
from lowprec.run_folder import RunFolder, open_run
from lowprec.train.options import AUTO

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_PRECISION = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


def start_accelerator(recipe: Recipe) -> tuple[Accelerator, str | None]:
    """Accelerate with the recipe's precision and trackers, and what the user should be told of the precision.

    ``model.dtype=auto`` is settled here, so that the recipe stored with the run says what it ran in.

    Raises:
        UserError: it was launched in a way that lowprec or this recipe does not run, or a tracker is not installed.
    """
    use_expandable_segments()  # for those who do not come by the command line
    # Accelerate finds CPU processes (gloo) only where it is told that there is no GPU to use.
    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    note = settle_dtype(recipe.model, PartialState(cpu=cpu).device)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=_PRECISION[recipe.model.dtype],
        log_with=_trackers(recipe.train.report_to) or None,
        project_dir=recipe.train.output_dir,
        # fp16 only: a fixed loss scale. A scale that adapts is a state of its own, and it adapts by overflowing, which
        # here would stop the run.
        kwargs_handlers=[GradScalerKwargs(init_scale=1024.0, growth_interval=2**31 - 1)],
    )
    if accelerator.distributed_type not in _SUPPORTED:
        raise UserError(
            f"accelerate launch asks for {accelerator.distributed_type.value}, which lowprec does not run. "
            "Use plain data parallelism (--multi_gpu) or a single process."
        )
    if recipe.train.offload_embeddings and accelerator.num_processes > 1:
        raise UserError(
            f"train.offload_embeddings=true is for one process, and there are {accelerator.num_processes}: set it to "
            "false, or launch one process."
        )
    if recipe.choice("state_store") == "ssd" and accelerator.num_processes > 1:
        raise UserError(
            f"state_store=ssd is for one process, and there are {accelerator.num_processes}: choose state_store=gpu or "
            "cpu, or launch one process."
        )
    return accelerator, note


def claim_run_folder(recipe: Recipe, accelerator: Accelerator) -> RunFolder | None:
    """``open_run`` on the main process; its result, or its UserError, in all. Only the main process holds the lock."""
    folder, wrong = None, None
    if accelerator.is_main_process:
        try:
            folder = open_run(str(recipe.train.output_dir), recipe.train.resume_from_checkpoint)
        except UserError as error:
            wrong = str(error)
    if accelerator.num_processes > 1:
        shared: list[Any] = [wrong, folder and folder.path, folder and folder.resume_from]
        broadcast_object_list(shared)
        wrong, path, resume_from = shared
        if folder is None and path is not None:
            folder = RunFolder(path, resume_from, messages=[])
    if wrong is not None:
        raise UserError(wrong)
    return folder


def _trackers(report_to: list[str]) -> list[str]:
    names = []
    for name in report_to:
        if name == AUTO:
            names += ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
        elif name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join([AUTO, *LOGGER_TYPE_TO_CLASS])
            raise UserError(f"train.report_to names {name}, which is no tracker of Accelerate. Those are: {known}.")
        elif importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.report_to names {name}, which is not installed: pip install {name}, or train.report_to=[]."
            )
        else:
            names.append(name)
    return names
