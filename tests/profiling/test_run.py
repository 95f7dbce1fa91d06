"""``lowprec profile``: a whole profile of a recipe, memory that runs out as a result, two profiles side by side."""

import gzip
import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lowprec.cli import main
from lowprec.config import resolve
from lowprec.errors import UserError
from lowprec.plan.settle import Choice
from lowprec.profiling.folder import read, read_two
from lowprec.profiling.run import profile_recipe
from tests.activations.rehearsal import Rehearsal
from tests.train.conftest import arguments, fresh_accelerate, tiny  # noqa: F401  fixtures

QUICK = ("profile.warmup_steps=1", "profile.steps=3")


def profiled(recipe: str, overrides: list[str]) -> tuple[dict, str]:
    output = StringIO()
    merged = dict(pair.split("=", 1) for pair in overrides)
    pairs = [f"{key}={value}" for key, value in merged.items()]
    return profile_recipe(resolve(recipe, pairs)[0], Console(file=output, width=140)), output.getvalue()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "profile"


@pytest.fixture
def lora(arguments, folder):  # noqa: F811
    def run(*more: str, at: Path = folder) -> tuple[dict, str]:
        return profiled("lora", arguments(*QUICK, f'profile.output_dir="{at}"', *more))

    return run


def test_a_whole_profile(lora, folder):
    figures, printed = lora("train.gradient_accumulation_steps=2")
    assert figures["status"] == "ok" and figures["steps"] == 3
    written = read(str(folder))
    assert written["step_time_ms_p50"] <= written["step_time_ms_p90"] and len(written["step_times_ms"]) == 3
    assert 0 < written["tokens_per_second"] < written["all_tokens_per_second"] <= written["padded_tokens_per_second"]
    phases = written["phases_ms"]
    assert sum(phases[p] for p in ("data", "forward", "backward", "optimizer")) == pytest.approx(
        written["step_time_ms_p50"], rel=0.5
    )
    memory = written["memory"]
    assert memory["peak_gib"] == pytest.approx(sum(memory["parts_gib"].values()))
    assert memory["parts_gib"]["adapters"] > 0 and memory["at"]["phase"] in ("forward", "backward")
    assert {row["kind"] for row in memory["modules"]} >= {"weights", "activations"}
    assert written["mfu"]["tflop_per_step"]["fp32"] > 0
    assert written["power"]["source"] == "none" or written["power"]["energy_j"] > 0
    assert sum(written["kernels"]["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert set(written["files"]) == {"profile.json", "trace.json.gz"} and written["layers"] == {"fp32": 15}
    assert "adapter" in written["recipe"] and str(folder) in printed.replace("\n", "")
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        assert any("mm" in event.get("name", "") for event in json.load(file)["traceEvents"])


def test_layers_in_graphs_make_room_before_memory_is_followed(lora, folder, monkeypatch):
    """On the CPU, with a recorder that takes the recorded function again."""
    forgotten = []

    class Recorder(Rehearsal):
        def forget(self):
            forgotten.append(self.replays)

    monkeypatch.setattr("lowprec.train.built.settle_on", lambda *args, **keys: Choice("full", "of the test", True))
    monkeypatch.setattr("lowprec.plan.settle.why_no_graphs", lambda *args: None)
    monkeypatch.setattr("lowprec.activations.graphs.Recorder", Recorder)
    figures, printed = lora("train.gradient_accumulation_steps=1", "data.pad_to_multiple_of=96")
    assert "Layers as CUDA graphs." in printed and "cuda_graphs: true" in figures["recipe"]
    assert len(forgotten) == 1 and forgotten[0] > 0, "replayed before"
    assert figures["status"] == "ok" and figures["memory"]["parts_gib"]["activations"] > 0
    assert any(re.match(r"Recording layers as CUDA graphs took \d+\.\d s", note) for note in figures["notes"])


def test_the_page_holds_all_it_shows(lora, folder):
    lora()
    page = (folder / "profile.html").read_text()
    assert page.count("<svg") >= 4 and "prefers-color-scheme:dark" in page
    assert "Every key with its value" in page and "per_device_train_batch_size: " in page
    assert not re.search(r"<script|<link|@import|url\(|src=|https?://", page)


def test_memory_that_runs_out_is_a_result(lora, folder, tmp_path):
    whole, _ = lora("train.per_device_train_batch_size=8", at=tmp_path / "whole")
    limit = whole["memory"]["peak_gib"] * 0.8
    eight = ("train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1")
    figures, printed = lora(*eight, f"profile.vram_limit_gib={limit}")
    assert figures["status"] == "out_of_memory" and read(str(folder))["status"] == "out_of_memory"
    assert figures["memory"]["ran_out"] and figures["memory"]["parts_gib"]["activations"] > 0
    fits = figures["out_of_memory"]["fits"]
    assert fits["train.per_device_train_batch_size"] * fits["train.gradient_accumulation_steps"] == 8
    assert fits["train.per_device_train_batch_size"] < 8
    assert "Tried, and it fits" in printed and "What was alive: " in printed
    length = figures["out_of_memory"]["row_length"]
    assert 0 < length <= 96 and f"Predicted for rows of {length} tokens" in printed, "as the step had them"
    assert "out of memory" in (folder / "profile.html").read_text()
    change = [f"{key}={value}" for key, value in fits.items()]
    again, _ = lora(*change, f"profile.vram_limit_gib={limit}", at=tmp_path / "fits")
    assert again["status"] == "ok" and "simulated" in again["notes"][0]


def test_a_model_that_does_not_fit_at_all(lora):
    figures, _ = lora("profile.vram_limit_gib=0.0001")
    assert figures["status"] == "out_of_memory" and "tokens_per_second" not in figures
    assert "loaded" in figures["out_of_memory"]["where"]
    assert "predicted" in figures["out_of_memory"]["told"][-1].lower()


def test_two_profiles_side_by_side(lora, tmp_path, capsys):
    for name in "ab":
        lora(f"data.max_length={48 if name == 'a' else 96}", at=tmp_path / name)
    target = tmp_path / "both.html"
    assert main(["profile", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "second / first" in printed and " x" in printed
    one, other = read_two(f"{tmp_path}/a/", str(tmp_path / "b"))
    assert (one["name"], other["name"]) == (str(tmp_path / "a"), str(tmp_path / "b")), "two of one recipe"
    deeper = tmp_path / "not_there" / "yet.html"
    assert main(["profile", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(deeper)]) == 0
    assert deeper.read_text() == target.read_text()
    assert main(["profile", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path)]) == 1
    assert "Name a file" in capsys.readouterr().err
    page = target.read_text()
    assert page.count("<svg") >= 6 and not re.search(r"<script|<link|https?://", page)


def test_mistakes(lora, folder, tmp_path, capsys):
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(UserError, match=r"profile\.output_dir"):
        lora()
    for wrong, named in (
        (["profile"], "--compare"),
        (["profile", "lora", "--study", "consumer_gpu"], "one of"),
        (["profile", "--compare", str(tmp_path), str(tmp_path)], "is no profile"),
        (["profile", "lora", "--output", "here"], "profile.output_dir=here"),
        (["profile", "lora", "--reduced"], "--study"),
        (["profile", "--compare", "a", "b", "--shape", "tiny"], "--study"),
        (["profile", "quickstart", "profile.steps=0"], "profile.steps=0"),
        (["profile", "quickstart", "profile.vram_limit_gib=0"], "null"),
    ):
        assert main(wrong) == 1
        assert named in capsys.readouterr().err


@pytest.mark.gpu
def test_a_whole_profile_on_a_gpu(arguments, folder):  # noqa: F811
    figures, _ = profiled(
        "lora", arguments(*QUICK, "model.dtype=bf16", "profile.vram_limit_gib=4", f'profile.output_dir="{folder}"')
    )
    assert figures["status"] == "ok" and 0 < figures["peak_vram_gib"] < 4
    assert figures["memory"]["parts_gib"].keys() >= {"slack", "context"}
    assert figures["memory"]["peak_gib"] == pytest.approx(figures["peak_vram_gib"], rel=0.05)
    assert {"forward", "backward", "optimizer"} <= figures["peak_by_phase_gib"].keys()
    assert figures["kernels"]["measured_on"] == "device" and "speed is still" in figures["notes"][0]
    assert (folder / "memory_snapshot.pickle").stat().st_size > 0
