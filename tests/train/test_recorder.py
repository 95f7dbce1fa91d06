"""What the report says of energy, CO2e and the card's life."""

import errno
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lowprec.config import resolve
from lowprec.errors import UserError
from lowprec.machine import energy
from lowprec.report import print_summary
from lowprec.run_folder import RunFolder, Status, read_metrics
from lowprec.train.recorder import Recorder
from tests.machine.test_energy import Nvml, domain
from tests.train.conftest import run

PROGRESS = {
    "step": 1, "trained_tokens": 5, "eval_loss_before": None, "eval_loss": None, "eval_step": 0, "answers_before": [],
    "answers": [],
}  # fmt: skip


def recorder(folder, device: str = "cpu", processes: int = 1, **folder_state) -> Recorder:
    recipe, _ = resolve("quickstart", ["train.grid_g_co2e_per_kwh=36"])
    accelerator = SimpleNamespace(
        is_main_process=True,
        device=torch.device(device),
        num_processes=processes,
        init_trackers=lambda *args, **kwargs: None,
        log=lambda *args, **kwargs: None,
    )
    folder.mkdir(exist_ok=True)
    made = Recorder(recipe, RunFolder(folder, messages=[], **folder_state), accelerator, Console(quiet=True))
    made.facts["dtypes"] = {"trained_parameters": {}, "optimizer_states": {}, "compute": "float32"}
    made.begin(0)
    return made


def test_energy_of_the_processor_and_of_the_process_that_is_resumed(tmp_path, monkeypatch):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 0, wrap=10**9)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    first = recorder(tmp_path / "run", resume_from=None)
    (package / "energy_uj").write_text("200000000")
    first.row({"step": 1, "loss": 1.0, "step_time_ms": 5.0, "tokens_per_second": 1.0, "all_tokens_per_second": 1.0})
    report = first.report(Status.INTERRUPTED, PROGRESS)["footprint"]
    assert (report["energy_j"], report["energy_source"], report["gpu_hours"]) == (200.0, "rapl", 0.0)
    assert report["co2e_g"] == pytest.approx(200 / 3.6e6 * 36)
    again = recorder(tmp_path / "run", resume_from=tmp_path / "run" / "checkpoints" / "step-1")
    (package / "energy_uj").write_text("250000000")
    total = again.report(Status.FINISHED, PROGRESS)
    assert total["footprint"]["energy_j"] == 250.0 and total["footprint"]["seconds"] >= report["seconds"]
    console = Console(record=True, width=160)
    print_summary(total, tmp_path, console)
    assert "kWh (the processor's)" in console.export_text()


def test_two_cards_live_twice_as_fast_and_an_estimate_is_called_one(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(energy, "time", clock)
    monkeypatch.setattr(energy, "nvml_handle", lambda module, device: str(device))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(None, 100_000))
    with monkeypatch.context() as two_cards:
        two_cards.setattr(torch.cuda, "device_count", lambda: 2)
        made = recorder(tmp_path / "run", "cuda:0", 2, resume_from=None)
    clock.now = 1800.0
    report = made.report(Status.FINISHED, PROGRESS)
    assert report["footprint"]["gpu_hours"] == 1.0 and report["footprint"]["energy_kwh"] == pytest.approx(0.1)
    console = Console(record=True, width=160)
    print_summary(report, tmp_path, console)
    text = console.export_text()
    assert "an estimate by its power limit" in text and "3.6 g at 36 g a kWh" in text and "of a card's life" in text


def test_unknown_energy_is_null_with_its_reason_and_takes_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    report = recorder(tmp_path / "run", resume_from=None).report(Status.FINISHED, PROGRESS)
    assert report["footprint"]["energy_kwh"] is None and "RAPL" in report["footprint"]["energy_note"]
    console = Console(record=True, width=160)
    print_summary(report, tmp_path, console)
    assert "kWh" not in console.export_text()


def test_rows_are_written_once_a_second_and_trackers_get_the_newest(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("lowprec.train.recorder.time", clock)
    made, logged = recorder(tmp_path / "run", resume_from=None), []
    made.accelerator.log = lambda values, step: logged.append((step, *values))
    for step in range(1, 6):
        made.row({"step": step, "loss": 1.0})
        clock.now += 0.3
    assert [row["step"] for row in made.folder.metrics()] == [1, 2, 3, 4, 5]
    assert logged == [(1, "loss"), (5, "loss")]
    made.row({"step": 6, "loss": 1.0})
    made.row({"step": 6, "eval_loss": 2.0})
    assert len(made.folder.metrics()) == 5, "not yet"
    made.flush()
    made.flush()
    assert [row["step"] for row in made.folder.metrics()] == [1, 2, 3, 4, 5, 6, 6]
    assert logged[2:] == [(6, "loss"), (6, "eval_loss")]


def test_a_full_disk_ends_no_run_before_it_has_to_save(arguments, tmp_path, monkeypatch):
    append, refused = RunFolder.append_metrics, []

    def full_at_first(self, *rows):
        if any("loss" in row for row in rows) and len(refused) < 2:
            refused.append(rows)
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, *rows)

    monkeypatch.setattr(RunFolder, "append_metrics", full_at_first)
    monkeypatch.setattr("lowprec.train.recorder.SECONDS_BETWEEN_WRITES", 0.0)
    _, printed = run("lora", arguments("train.max_steps=4"))
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]
    assert len(refused) == 2 and " ".join(printed.split()).count("is full: training goes on") == 1


def test_room_for_what_will_be_saved_is_asked_before_the_first_step(arguments, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("lowprec.checkpoint.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"bytes more .*Nothing is trained yet"):
        run("lora", arguments("train.save_steps=2", "train.max_steps=4", "data.cache_dir=null"))
    assert read_metrics(tmp_path / "run") == []
