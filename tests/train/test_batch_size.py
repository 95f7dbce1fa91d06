"""The largest micro-batch that fits: found under a real limit, without a trace in the run that follows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowprec.config import resolve
from lowprec.profiling.alive import Alive
from lowprec.run_folder import read_metrics, read_report
from lowprec.testing import tiny_model
from lowprec.train.batch_size import divisors, graphs_to_come, largest_that_fits
from lowprec.train.out_of_memory import OutOfMemoryError
from tests.train.conftest import run
from tests.train.test_resume import settled

CPU = torch.device("cpu")


@given(st.integers(1, 200), st.integers(0, 250))
def test_the_largest_divisor_below_the_limit_is_found_and_memory_runs_out_once(effective, limit):
    failures = []

    def fits(size):
        failures.extend([size] if size > limit else [])
        return size <= limit

    best, too_large = largest_that_fits(divisors(effective), fits)
    expected = [size for size in range(1, effective + 1) if effective % size == 0 and size <= limit]
    assert best == (expected[-1] if expected else None) and len(failures) <= 1
    assert too_large == next((s for s in divisors(effective) if s > limit), None)


EFFECTIVE = 8
COMMON = (
    "train.max_steps=3",
    "train.per_device_train_batch_size=1",
    f"train.gradient_accumulation_steps={EFFECTIVE}",
    "adapter.lora_dropout=0.1",
    "train.num_sample_answers=0",
    "train.eval_max_samples=1",
    "train.report_to=[]",
)


def limited_run(arguments, limit, *more, output):
    """Train on a device of ``limit`` bytes (None: any): storages are counted as they come."""
    alive = Alive(CPU, limit=limit)
    with alive:
        printed = run("lora", arguments(*COMMON, *more, output=output))[1]
    return max(moment.peak for moment in alive.moments), printed


def test_found_under_a_limit_and_bit_identical_to_the_same_by_hand(arguments, tmp_path):
    peaks = {
        size: limited_run(
            arguments, None, f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={EFFECTIVE // size}", "train.max_steps=1", output=f"peak-{size}",
        )[0]
        for size in (2, 4)
    }  # fmt: skip
    limit = (peaks[2] + peaks[4]) // 2
    _, printed = limited_run(arguments, limit, "train.find_batch_size=true", output="found")
    assert "2 of the longest samples fit at once, 4 did not" in printed and "8 samples as 4 x 2" in printed
    report = read_report(tmp_path / "found")
    assert report["find_batch_size"] == {"batch_size": 2, "accumulation": 4, "too_large": 4}
    assert "per_device_train_batch_size: 2\n" in (tmp_path / "found" / "recipe.yaml").read_text()

    keys = ("train.find_batch_size=true", "train.max_steps=1", f"profile.vram_limit_gib={limit / 2**30}")
    printed = run("lora", arguments(*COMMON, *keys, output="by_key"))[1]
    assert "2 of the longest samples fit at once, 4 did not" in printed and "is simulated on this processor" in printed

    by_hand = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=4")
    run("lora", arguments(*COMMON, *by_hand, output="by_hand"))
    assert settled(tmp_path / "found") == settled(tmp_path / "by_hand")
    assert len([row for row in read_metrics(tmp_path / "found") if "loss" in row]) == 3


def test_without_a_limit_the_whole_batch_is_taken_and_a_resumed_run_keeps_its_division(arguments, tmp_path):
    found = ("train.find_batch_size=true", "train.save_steps=1")
    printed = run("lora", arguments(*COMMON, *found))[1]
    assert f"{EFFECTIVE} of the longest samples fit at once. A step takes 8 samples as 1 x 8" in printed
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    again = (*found, f'train.resume_from_checkpoint="{checkpoint}"')
    printed = run("lora", arguments(*COMMON, *again, output="resumed"))[1]
    assert "of the longest samples" not in printed and "not that of one run" not in printed
    assert settled(tmp_path / "resumed")[1] == settled(tmp_path / "run")[1]


def test_a_stream_is_tried_at_its_greatest_length(arguments, tmp_path):
    stream = ("data.streaming=true", "data.eval_samples=4", "train.find_batch_size=true", "data.max_length=96")
    run("lora", arguments(*COMMON, *stream))
    assert read_report(tmp_path / "run")["find_batch_size"]["batch_size"] == EFFECTIVE


def test_not_even_one_sample_fits(arguments):
    with pytest.raises(OutOfMemoryError, match=r"data\.max_length|weights=nf4"):
        limited_run(arguments, 600_000, "train.find_batch_size=true", output="none")


def test_what_graphs_hold_is_kept_free(monkeypatch):
    config = tiny_model("llama", num_hidden_layers=6, hidden_size=256).config
    keys = ["model.model_name_or_path=./nowhere", "data.path=none", "data.max_length=256"]
    said: list[str] = []

    def to_come(*more):
        return graphs_to_come(resolve("lora", [*keys, *more])[0], config, said.append)

    few, many = (to_come("train.cuda_graphs=true")(rows) for rows in (1, 16))
    assert 0 < few < many
    assert to_come("train.cuda_graphs=false")(4) == 0
    monkeypatch.setattr("lowprec.plan.Planner.predict", None)  # of a model that cannot be traced nothing is known
    assert said == [] and to_come("train.cuda_graphs=true")(4) == 0
    assert "does not count the memory of CUDA graphs: TypeError" in said[0]


@pytest.mark.gpu
def test_found_on_a_limited_gpu(arguments, tmp_path):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    sizes = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4096")
    try:
        run("full", arguments(*sizes, "model.dtype=bf16", "train.find_batch_size=true", "train.max_steps=1"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = read_report(tmp_path / "run")["find_batch_size"]
    assert found["batch_size"] * found["accumulation"] == 4096 and found["batch_size"] > 1
