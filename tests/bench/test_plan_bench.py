"""``bench plan`` over a tiny shape on a processor: its rows, its table, and that it goes on where it stopped."""

import pytest
import torch

from lowprec.bench import plan as plan_bench
from lowprec.bench.plan import BOUNDS, bench_plan, errors, grid, markdown, misses, read
from lowprec.bench.train.works import TINY, Work
from lowprec.errors import UserError

FIXED = ("train.gradient_accumulation_steps=1", "model.dtype=fp32")


def tiny(name: str, recipe: str) -> Work:
    return Work(name, TINY, 1, 16, recipe, FIXED, warmup=1, timed=1)


def test_the_grid_is_what_the_promise_is_made_of():
    names = list(grid())
    assert len(names) >= 40
    for part in ("135m", "1b", "8b", "full", "lora", "qlora", "fp8", "=none", "=full", "x512", "x4096", "8x",
                 "=cpu", "=ssd"):  # fmt: skip
        assert any(part in name for name in names), part


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, cells of the tiny shape have no promise to keep")
def test_it_writes_a_row_a_cell_and_goes_on(tmp_path):
    works = {name: tiny(name, name) for name in ("full", "lora")}
    first = bench_plan(tmp_path, works=works, names=["full"], tell=lambda text: None)
    assert "| full |" in first and "| lora |" not in first
    told: list[str] = []
    table = bench_plan(tmp_path, works=works, tell=told.append)
    assert len(told) == 2 and told[1].startswith("1/1 | lora")  # a note on the machine, and the one cell that was left
    assert [row["cell"] for row in read(tmp_path / "bench_plan.jsonl")] == ["full", "lora"]
    assert table == (tmp_path / "bench_plan.md").read_text()
    for row in read(tmp_path / "bench_plan.jsonl"):
        assert row["step_ms"] > 0 and row["predicted_allocated_gb"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, cells of the tiny shape have no promise to keep")
def test_a_cell_that_fails_and_a_line_cut_off_stop_nothing(tmp_path, monkeypatch):
    def fails(work, folder, device):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(plan_bench, "measure", fails)
    (tmp_path / "bench_plan.jsonl").write_text('{"cell": "full", "predi')
    table = bench_plan(tmp_path, works={"lora": tiny("lora", "lora")}, tell=lambda text: None)
    assert [row["cell"] for row in read(tmp_path / "bench_plan.jsonl")] == ["lora"]
    monkeypatch.undo()
    again = bench_plan(tmp_path, works={"lora": tiny("lora", "lora")}, tell=lambda text: None)
    assert "failed" not in again and [row["cell"] for row in read(tmp_path / "bench_plan.jsonl")] == ["lora"]
    assert "| lora | failed |" in table and "- lora: not measured: RuntimeError: no such kernel" in table


def test_names_of_no_cell_are_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no cell has that in its name"):
        bench_plan(tmp_path, names=["70b"])


def test_memory_that_runs_out_against_the_plan_is_a_miss():
    row = {"cell": "x", "out_of_memory": True, "memory_gib": 80.0, "predicted_parts_gb": {"weights": 50.0}}
    assert misses([row]) == ["x: out of memory, predicted to fit (46.6 of 80.0 GiB)"]
    assert misses([row | {"memory_gib": 40.0}]) == []


def test_it_needs_a_gpu_for_real_shapes(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="needs a GPU"):
        bench_plan(tmp_path)


def test_misses_are_named():
    row = {"cell": "x", "out_of_memory": False, "allocated_gb": 10.0, "reserved_gb": 11.0, "step_ms": 100.0}
    row |= {"predicted_allocated_gb": 10.6, "predicted_reserved_gb": 11.1, "predicted_step_ms": 130.0}
    assert errors(row) == pytest.approx({"allocated": 0.06, "reserved": 0.00909, "step_ms": 0.3}, abs=1e-4)
    table = markdown([row], torch.device("cpu"), None)
    assert "+6.0% **miss**" in table and "+30.0% **miss**" in table and "+0.9% |" in table
    assert f"allocated: 0% of 1 cells within {BOUNDS['allocated'][0]:.0%}" in table
