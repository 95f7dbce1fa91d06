"""A run killed at any moment and resumed ends as one that was left alone: bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lowprec.checkpoint import newest_whole
from lowprec.errors import UserError
from lowprec.run_folder import Status, read_metrics, read_report
from tests.train.conftest import ended, run, started, wait_for

TIMING = ("_ms", "tokens_per_second", "_gib")
KINDS = {
    "full": ("full", "model.dtype=bf16"),
    "lora": ("lora", "adapter.lora_dropout=0.1"),
    "qlora": ("qlora_nf4", "model.dtype=bf16"),
    "full_int8": ("full", "optimizer=adamw_8bit"),
    "full_stochastic": ("full", "model.dtype=bf16", "optimizer.master=none"),
    "packed": ("full", "data.packing=true", "train.gradient_checkpointing=true"),
}


def settled(folder: Path) -> tuple[list[dict], dict[str, bytes]]:
    """The metrics without times, and the bytes of every weight file of ``final/``."""
    rows = [{key: value for key, value in row.items() if not key.endswith(TIMING)} for row in read_metrics(folder)]
    return rows, {file.name: file.read_bytes() for file in sorted((folder / "final").glob("*.safetensors"))}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_and_resumed_is_bit_identical(kind, arguments, tmp_path):
    recipe, *extra = KINDS[kind]
    # Checkpoints at every second step: a good part of the time goes into writing them, and so do the kills.
    common = (
        *extra,
        "train.max_steps=8",
        "train.save_steps=2",
        "train.eval_steps=3",
        "train.resume_from_checkpoint=auto",
    )
    undisturbed = started(recipe, arguments(*common, output="undisturbed"))
    assert ended(undisturbed) == 0
    chance = random.Random(kind)
    kills, exitcode = 0, None
    for step in sorted(chance.sample(range(7), 4)):
        process = started(recipe, arguments(*common, output="killed"))
        wait_for(lambda: len(read_metrics(tmp_path / "killed")) >= step, process)  # noqa: B023
        time.sleep(chance.uniform(0, 0.03))
        process.kill()  # SIGKILL; of a process that was faster than this, nothing
        exitcode = ended(process)
        kills += exitcode == -signal.SIGKILL
        assert exitcode in (0, -signal.SIGKILL)
    assert kills >= 2
    if exitcode != 0:
        last = started(recipe, arguments(*common, output="killed"))
        assert ended(last) == 0
    rows, weights = settled(tmp_path / "killed")
    expected_rows, expected_weights = settled(tmp_path / "undisturbed")
    assert rows == expected_rows
    assert weights == expected_weights and weights


def test_killed_while_a_checkpoint_is_written(arguments, tmp_path):
    """Kills as soon as the temporary folder of a checkpoint is seen, at every checkpoint of the run."""
    common = ("train.max_steps=6", "train.save_steps=1", "train.resume_from_checkpoint=auto")
    run("full", arguments(*common, output="undisturbed"))
    folder, kills, patience = tmp_path / "killed" / "checkpoints", 0, time.monotonic() + 200
    process = started("full", arguments(*common, output="killed"))
    while process.exitcode is None or kills < 3:
        assert time.monotonic() < patience
        if kills < 3 and any(folder.glob(".writing-*")):
            process.kill()
            ended(process)
            kills += 1
            process = started("full", arguments(*common, output="killed"))
            time.sleep(0.3)  # the new process removes what the old one was writing
        if process.exitcode == 0:
            break
    assert ended(process) == 0
    assert kills >= 1
    assert settled(tmp_path / "killed") == settled(tmp_path / "undisturbed")
    assert not list(folder.glob(".writing-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_own_code(number, arguments, tmp_path):
    common = ("train.max_steps=300", "train.resume_from_checkpoint=auto")
    process = started("full", arguments(*common))
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 3, process)
    os.kill(process.pid, number)
    assert ended(process) == 75
    report = read_report(tmp_path / "run")
    newest, _ = newest_whole(tmp_path / "run" / "checkpoints")
    assert report["status"] == "interrupted"
    assert newest is not None and newest.name == f"step-{report['steps']}"
    assert read_metrics(tmp_path / "run")[-1]["step"] == report["steps"]


def test_a_second_ctrl_c_stops_at_once(arguments, tmp_path):
    """Tried a few times: a signal that comes just before the end of a step is answered by saving, as it should be."""
    for attempt in range(6):
        name = f"run-{attempt}"
        long_steps = (
            "train.max_steps=300",
            "train.per_device_train_batch_size=1",
            "train.gradient_accumulation_steps=36",
        )
        process = started("full", arguments(*long_steps, output=name))
        wait_for(lambda: len(read_metrics(tmp_path / name)) >= 2, process)  # noqa: B023
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.03)
        os.kill(process.pid, signal.SIGINT)
        exitcode = ended(process)
        if exitcode == 130 and newest_whole(tmp_path / name / "checkpoints")[0] is None:
            return
        assert exitcode in (75, 130)  # it was saving, or had saved, when the second one came
    pytest.fail("no run stopped at its second Ctrl-C")


def test_a_finished_run_is_left_alone(arguments, tmp_path):
    common = ("train.max_steps=2", "train.resume_from_checkpoint=auto")
    run("full", arguments(*common))
    before = (tmp_path / "run" / "report.json").read_text()
    status, printed = run("full", arguments(*common))
    assert status is Status.FINISHED and "Nothing to do" in printed and "not applied" not in printed
    printed = run("full", arguments(*common, "train.max_steps=9"))[1]
    assert "train.max_steps=9 was not applied" in " ".join(printed.split())
    assert (tmp_path / "run" / "report.json").read_text() == before


def test_more_steps_can_be_added_to_a_checkpoint(arguments, tmp_path):
    """A checkpoint named by hand, from another folder, with another number of steps: told, and gone on from."""
    run("full", arguments("train.max_steps=4", "train.save_steps=2", output="first"))
    checkpoint = tmp_path / "first" / "checkpoints" / "step-4"
    longer = ("train.max_steps=6", f'train.resume_from_checkpoint="{checkpoint}"')
    _, printed = run("full", arguments(*longer, output="second"))
    assert "train.max_steps was 4" in printed and "Resuming after step 4" in printed
    assert [row["step"] for row in read_metrics(tmp_path / "second") if "loss" in row] == [5, 6]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("optimizer=adamw_8bit", "optimizer "),
        ("optimizer.master=none", "optimizer.master"),
        ("model.dtype=bf16", "model.dtype"),
        ("adapter=lora", "adapter"),
    ],
)
def test_another_recipe_cannot_resume(change, named, arguments, tmp_path):
    run("full", arguments("train.max_steps=2", "train.save_steps=2", output="first"))
    checkpoint = tmp_path / "first" / "checkpoints" / "step-2"
    with pytest.raises(UserError, match=named):
        run("full", arguments(change, f'train.resume_from_checkpoint="{checkpoint}"', output="second"))


def test_a_checkpoint_holds_no_pickle(arguments, tmp_path):
    run("full", arguments("train.max_steps=2", "train.save_steps=2"))
    files = [file for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".yaml"}
    assert load_file(tmp_path / "run" / "checkpoints" / "step-2" / "trainable.safetensors")


def test_another_learning_rate_is_taken_from_the_recipe(arguments, tmp_path):
    schedule = ("optimizer.lr_scheduler_type=constant", "optimizer.warmup_ratio=0")
    run("full", arguments(*schedule, "train.max_steps=2", "train.save_steps=2", output="first"))
    checkpoint = tmp_path / "first" / "checkpoints" / "step-2"
    changed = ("optimizer.learning_rate=3e-3", "train.max_steps=4", f'train.resume_from_checkpoint="{checkpoint}"')
    _, printed = run("full", arguments(*schedule, *changed, output="second"))
    assert "optimizer.learning_rate was 0.01" in printed
    assert [row["learning_rate"] for row in read_metrics(tmp_path / "second") if "loss" in row] == [3e-3, 3e-3]


def test_fewer_steps_than_the_checkpoint_has_are_refused(arguments, tmp_path):
    run("full", arguments("train.max_steps=4", "train.save_steps=4", output="first"))
    checkpoint = tmp_path / "first" / "checkpoints" / "step-4"
    with pytest.raises(UserError, match=r"train\.max_steps to at least"):
        run("full", arguments("train.max_steps=2", f'train.resume_from_checkpoint="{checkpoint}"', output="second"))
