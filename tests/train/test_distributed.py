"""``accelerate launch`` on two CPU processes: the losses of one process with the same effective batch."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

from lowprec.checkpoint import newest_whole
from lowprec.run_folder import read_metrics, read_report


@contextmanager
def launched(num_processes: int, recipe: str, arguments: list[str], program=("-m", "lowprec")):
    """The launcher, running; killed with all it started where the test fails."""
    launcher = (
        ["--multi_gpu"] if num_processes > 1 else ["--cpu"]
    )  # --cpu starts a single process, whatever is asked for
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_processes", str(num_processes),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        *program, "train", recipe, *arguments,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            yield process
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def launch(num_processes: int, recipe: str, arguments: list[str]) -> None:
    with launched(num_processes, recipe, arguments) as process:
        _, printed = process.communicate(timeout=250)
    assert process.returncode == 0, printed[-3000:]


def pid_of_rank(launcher: int, rank: int) -> int:
    """The process of that rank among the launcher's children."""
    for child in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank):
                return child.pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_two_processes_give_the_losses_of_one(recipe, arguments, tmp_path):
    saving = ("train.save_steps=4", "train.eval_steps=2")
    launch(1, recipe, arguments(*saving, output="one"))
    launch(2, recipe, arguments(*saving, "train.gradient_accumulation_steps=1", output="two"))
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4)
        assert mine.get("trained_tokens") == theirs.get("trained_tokens")
    assert read_report(tmp_path / "two")["status"] == "finished"
    checkpoint = tmp_path / "two" / "checkpoints" / "step-4"
    assert {file.name for file in checkpoint.glob("random-*")} == {"random-0.safetensors", "random-1.safetensors"}

    # Resuming with two processes ends where the undisturbed two did.
    again = arguments(*saving, "train.gradient_accumulation_steps=1", f'train.resume_from_checkpoint="{checkpoint}"',
                      output="resumed")  # fmt: skip
    launch(2, recipe, again)
    last, expected = read_metrics(tmp_path / "resumed")[-1], two[-1]
    assert last["eval_loss"] == expected["eval_loss"]


def test_a_sigterm_of_one_process_stops_all_at_the_same_step_with_a_checkpoint(arguments, tmp_path):
    folder = tmp_path / "run"
    with launched(2, "full", arguments("train.max_steps=2000", "train.gradient_accumulation_steps=1")) as process:
        end = time.monotonic() + 120
        while not (folder / "metrics.jsonl").is_file() or len(read_metrics(folder)) < 4:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        os.kill(pid_of_rank(process.pid, 1), signal.SIGTERM)
        _, printed = process.communicate(timeout=120)
    report = read_report(folder)
    assert process.returncode != 0, "the launcher passes on that the run is not finished"
    assert report["status"] == "interrupted", printed[-3000:]
    newest, _ = newest_whole(folder / "checkpoints")
    assert newest is not None and newest.name == f"step-{report['steps']}"
    assert {file.name for file in newest.glob("random-*")} == {"random-0.safetensors", "random-1.safetensors"}


def test_an_error_of_one_process_ends_all_and_leaves_the_last_checkpoint(arguments, tmp_path):
    """The others wait for it in a sum of gradients, which must not be for ever."""
    program = tmp_path / "fails.py"
    program.write_text(FAILS)
    more = ("train.max_steps=50", "train.save_steps=2", "train.gradient_accumulation_steps=1")
    with launched(2, "full", arguments(*more), program=(str(program),)) as process:
        _, printed = process.communicate(timeout=120)
    assert process.returncode != 0 and "out of luck in step 4" in printed
    newest, _ = newest_whole(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "step-2"
    assert read_report(tmp_path / "run")["status"] != "finished" and not (tmp_path / "run" / "final").exists()


FAILS = """
import os, sys
from lowprec.cli import main
from lowprec.train.step import TrainStep

take = TrainStep.__call__
calls = 0

def fail(self, *args, **kwargs):
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1":
        raise RuntimeError(f"out of luck in step {calls}")
    return take(self, *args, **kwargs)

TrainStep.__call__ = fail
sys.exit(main())
"""
