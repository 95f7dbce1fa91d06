"""``accelerate launch`` on two CPU processes: the losses of one process with the same effective batch."""

import os
import signal
import subprocess
import sys

import pytest

from lowprec.run_folder import read_metrics, read_report


def launch(num_processes: int, recipe: str, arguments: list[str]) -> None:
    launcher = (
        ["--multi_gpu"] if num_processes > 1 else ["--cpu"]
    )  # --cpu starts a single process, whatever is asked for
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_processes", str(num_processes),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "lowprec", "train", recipe, *arguments,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            _, printed = process.communicate(timeout=250)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and all it started
            raise
    assert process.returncode == 0, printed[-3000:]


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
