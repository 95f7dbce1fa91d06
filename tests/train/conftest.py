import json
import multiprocessing
import os
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from rich.console import Console

from lowprec.config import resolve
from lowprec.run_folder import Status
from lowprec.testing import save_tiny
from lowprec.train.interrupt import EXIT_INTERRUPTED
from lowprec.train.loop import train

PRELOAD = ["bitsandbytes", "datasets", "peft", "transformers.models.llama.modeling_llama"]  # else read when used
WORDS = ["blue", "green", "red", "yellow", "white", "black", "small", "large", "round", "flat", "cold", "warm"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state in the process; every run of a test begins without it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with the tiny model ``model``, 40 chats ``chats.jsonl`` and room for a cache."""
    folder = tmp_path_factory.mktemp("tiny with space")
    save_tiny(folder / "model", "llama")
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(40):
            words = [WORDS[(number * k + k) % len(WORDS)] for k in range(2, 4 + number % 5)]
            turns = [
                {"role": "user", "content": f"Say item {number}."},
                {"role": "assistant", "content": " ".join(words)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder


@pytest.fixture
def arguments(tiny, tmp_path) -> Callable[..., list[str]]:
    """Overrides for a run of a few seconds in ``tmp_path/run``; more may follow."""

    def build(*more: str, output: str = "run") -> list[str]:
        return [
            f'model.model_name_or_path="{tiny / "model"}"',
            "model.dtype=fp32",
            f'data.path="{tiny / "chats.jsonl"}"',
            f'data.cache_dir="{tiny / "cache"}"',
            "data.eval_fraction=0.1",
            "data.max_length=96",
            f'train.output_dir="{tmp_path / output}"',
            "train.max_steps=6",
            "train.per_device_train_batch_size=2",
            "train.gradient_accumulation_steps=2",
            "train.gradient_checkpointing=false",
            "train.sample_max_new_tokens=4",
            "train.eval_steps=null",
            "train.save_steps=null",
            "train.report_to=[]",
            "optimizer.learning_rate=1e-2",
            *more,
        ]

    return build


def run(recipe: str, arguments: list[str]) -> tuple[Status, str]:
    """Train in this process. Returns the status, and what was printed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = StringIO()
    status = train(resolve(recipe, _last_wins(arguments))[0], Console(file=output, width=160))
    return status, output.getvalue()


def started(recipe: str, arguments: list[str]) -> Any:
    """Train in a process of its own, which starts in a moment: it is forked from a server that imported everything.

    Not from the process of the tests: a fork keeps the locks that other threads held, and waits for them for ever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOAD])
    process = context.Process(target=_train_and_exit, args=(recipe, arguments))
    process.start()
    return process


def ended(process: Any) -> int:
    """The exit code of ``process``; one that does not end is killed, and the test fails."""
    process.join(timeout=120)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail("the training process did not end within 120 s")
    return process.exitcode


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    """Wait until ``condition`` holds or ``process`` has ended."""
    end = time.monotonic() + 120
    while not condition() and process.is_alive():
        assert time.monotonic() < end, "nothing happened for 120 s"
        time.sleep(0.001)


def _train_and_exit(recipe: str, arguments: list[str]) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            status, _ = run(recipe, arguments)
        except KeyboardInterrupt:
            os._exit(130)  # as the command line does
    os._exit({Status.FINISHED: 0, Status.INTERRUPTED: EXIT_INTERRUPTED}[status])


def _last_wins(arguments: list[str]) -> list[str]:
    return [f"{key}={value}" for key, value in dict(pair.split("=", 1) for pair in arguments).items()]
