import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowprec.checkpoint import atomic_folder
from lowprec.errors import UserError
from lowprec.run_folder import Status, open_run, read_metrics


def checkpoint(path):
    with atomic_folder(path) as writing:
        (writing / "trainable.safetensors").write_bytes(b"1234")


def test_a_new_folder_begins_at_the_beginning(tmp_path):
    folder = open_run(str(tmp_path / "run"), None)
    assert folder is not None and folder.resume_from is None


def test_a_folder_with_content_is_refused_naming_both_keys(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"train\.output_dir=.*train\.resume_from_checkpoint=auto"):
        open_run(str(tmp_path), None)


def test_auto_with_nothing_to_resume_begins(tmp_path):
    folder = open_run(str(tmp_path / "run"), "auto")
    assert folder is not None and folder.resume_from is None


def test_auto_takes_the_newest_whole_checkpoint(tmp_path):
    for step in (5, 10):
        checkpoint(tmp_path / "checkpoints" / f"step-{step}")
    (tmp_path / "checkpoints" / "step-10" / "trainable.safetensors").write_bytes(b"12")
    folder = open_run(str(tmp_path), "auto")
    assert folder is not None and folder.resume_from == tmp_path / "checkpoints" / "step-5"
    assert any("step-10" in message for message in folder.messages)


def test_a_finished_run_is_verified(tmp_path):
    checkpoint(tmp_path / "final")
    (tmp_path / "report.json").write_text(json.dumps({"status": Status.FINISHED.value}))
    assert open_run(str(tmp_path), "auto") is None
    (tmp_path / "final" / "trainable.safetensors").write_bytes(b"bad!")
    folder = open_run(str(tmp_path), "auto")
    assert folder is not None and "marked as finished" in folder.messages[0]


def test_a_damaged_checkpoint_named_by_hand_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"resume_from_checkpoint=.*step-7"):
        open_run(str(tmp_path / "run"), str(tmp_path / "step-7"))


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_run(str(tmp_path / "run"), None)


def test_a_second_run_is_refused_and_the_lock_dies_with_its_process(tmp_path):
    hold = (
        "import sys; from lowprec.run_folder import open_run\n"
        "folder = open_run(sys.argv[1], 'auto'); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        open_run(str(tmp_path), "auto")
    holder.kill()
    holder.wait()
    assert open_run(str(tmp_path), "auto") is not None


def test_metrics_of_steps_to_be_taken_again_are_dropped(tmp_path):
    folder = open_run(str(tmp_path), "auto")
    assert folder is not None
    for step in range(1, 6):
        folder.append_metrics({"step": step, "loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut off by a kill
    folder.forget_metrics_after(3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_an_older_checkpoint_is_not_taken_up_beside_newer_ones(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path / "checkpoints" / f"step-{step}")
    with pytest.raises(UserError, match=r"older than step-4.*train\.output_dir"):
        open_run(str(tmp_path), str(tmp_path / "checkpoints" / "step-2"))
    assert open_run(str(tmp_path / "other"), str(tmp_path / "checkpoints" / "step-2")) is not None
    assert open_run(str(tmp_path), str(tmp_path / "checkpoints" / "step-4")) is not None


@pytest.mark.parametrize("own", ["checkpoints/step-5", "final"])
def test_a_checkpoint_of_another_run_is_not_taken_up_in_a_folder_with_a_run_of_its_own(tmp_path, own):
    checkpoint(tmp_path / "one" / "checkpoints" / "step-9")
    checkpoint(tmp_path / "other" / own)
    with pytest.raises(UserError, match=rf"has {Path(own).name} of a run of its own.*another train\.output_dir"):
        open_run(str(tmp_path / "other"), str(tmp_path / "one" / "checkpoints" / "step-9"))


def test_a_full_disk_leaves_the_rows_that_were_there_whole(tmp_path, monkeypatch):
    folder = open_run(str(tmp_path), None)
    assert folder is not None
    folder.append_metrics({"step": 1, "loss": 1.0})

    def dumps(row):
        if row["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return json.dumps(row)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("lowprec.run_folder.json", SimpleNamespace(dumps=dumps))
        folder.append_metrics({"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.0})
    folder.append_metrics({"step": 2, "loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_run_folder_given_as_a_checkpoint_names_its_newest(tmp_path):
    checkpoint(tmp_path / "one" / "checkpoints" / "step-9")
    with pytest.raises(UserError, match=r"Its newest checkpoint is .*step-9"):
        open_run(str(tmp_path / "two"), str(tmp_path / "one"))


def test_starting_over_is_said(tmp_path):
    assert "nothing to resume" in open_run(str(tmp_path), "auto").messages[0]
    checkpoint(tmp_path / "checkpoints" / "step-9")
    (tmp_path / "checkpoints" / "step-9" / "manifest.json").write_text("{")
    assert open_run(str(tmp_path), "auto").messages[-1] == "No checkpoint here is whole; beginning from the start."
