"""Time by phase: the parts make up the step, waits are told apart, and training knows what measuring costs."""

import time

import pytest
import torch

from lowprec.optim.traffic import Traffic
from lowprec.profiling.phases import Phases
from lowprec.profiling.probe import Probes
from lowprec.run_folder import read_metrics, read_report
from lowprec.train.clock import Mark
from tests.train.conftest import arguments, fresh_accelerate, run, tiny  # noqa: F401  fixtures

CPU = torch.device("cpu")


def test_phases_make_up_the_step_and_steps_may_overlap():
    traffic = Traffic()
    phases = Phases(CPU, traffic)
    probes = Probes([phases])
    begun = []
    for number in range(3):
        probes.on_step_start()
        begun.append(Mark(CPU))
        phases.enter("forward")
        time.sleep(0.004)
        phases.enter("backward")
        phases.enter("forward")  # the second micro-batch
        time.sleep(0.002)
        phases.enter("optimizer")
        traffic.unhidden_s += 0.5 * number
        phases.leave()
        time.sleep(0.001)
        if number == 0:
            continue  # its figures are read while the second step is under way
        figures = probes.on_step_end()
        assert figures["forward_ms"] >= 6 and figures["backward_ms"] < figures["forward_ms"]
        assert "other_ms" not in figures
        assert figures["disk_wait_ms"] == (number - 1) * 500
        assert (figures["data_ms"] >= 1) == (number == 2)  # of the first step nothing comes before
    last = probes.on_step_end()
    assert last["data_ms"] >= 1 and last["disk_wait_ms"] == 1000
    assert 0 < probes.host_s < 0.05


def test_what_comes_between_steps_is_no_data_phase_and_waits_for_the_device_are_told():
    phases = Phases(CPU)
    for _ in range(2):
        phases.on_step_start()
        phases.enter("forward")
        phases.leave()
        with phases.waiting():
            time.sleep(0.003)
        figures = phases.on_step_end()
        assert figures["host_sync_ms"] >= 3 and figures["data_ms"] < 3
        phases.begin()


def test_what_is_waited_for_the_disk_between_steps_is_no_step_s():
    traffic = Traffic()
    phases = Phases(CPU, traffic)
    for waited in (0.5, 0.25):
        phases.begin()
        phases.on_step_start()
        phases.enter("optimizer")
        traffic.unhidden_s += waited
        phases.leave()
        assert phases.on_step_end()["disk_wait_ms"] == 1000 * waited
        traffic.unhidden_s += 3  # a checkpoint


def test_a_loop_that_nobody_measures_costs_nothing():
    phases = Phases(CPU)
    phases.enter("forward")
    phases.leave()
    assert phases.host_s == 0


def check_phases_make_up_steps(folder):
    """To the rounding of the figures, 10 us of the step's, however long anything took: they share their marks."""
    rows = [row for row in read_metrics(folder) if "loss" in row]
    assert rows
    for row in rows:
        parts = [row[f"{name}_ms"] for name in ("data", "forward", "backward", "optimizer")]
        assert sum(parts) == pytest.approx(row["step_time_ms"], abs=0.02) and min(parts[1:]) > 0


def test_training_writes_phases_and_what_they_cost(arguments, tmp_path):  # noqa: F811
    run("full", arguments("train.eval_steps=3"))
    check_phases_make_up_steps(tmp_path / "run")
    report = read_report(tmp_path / "run")
    assert set(report["phases_ms"]) == {"data", "forward", "backward", "optimizer", "disk_wait", "host_sync"}
    assert 0 < report["probe_cost_share"] < 1


def test_training_without_probes(arguments, tmp_path):  # noqa: F811
    run("full", arguments("profile.in_training=false", "train.max_steps=2"))
    assert all("forward_ms" not in row for row in read_metrics(tmp_path / "run"))
    report = read_report(tmp_path / "run")
    assert not {"phases_ms", "probe_cost_share"} & report.keys()


@pytest.mark.gpu
def test_phases_on_cuda_make_up_the_device_s_time(arguments, tmp_path):  # noqa: F811
    run("full", arguments("model.dtype=bf16", "train.max_steps=20", "train.eval_steps=7"))
    check_phases_make_up_steps(tmp_path / "run")
