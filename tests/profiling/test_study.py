"""The study: its design, real cells of a tiny shape, resumption, effects and verdicts from rows that are known."""

import json
from io import StringIO
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from rich.console import Console

from lowprec.cli import main
from lowprec.errors import UserError
from lowprec.profiling.study import run, run_study
from lowprec.profiling.study.cells import OPTIMIZERS, OWN, PAPER, PLAIN, SHAPES, Cell, all_cells, factorial
from lowprec.profiling.study.claims import verdicts
from lowprec.profiling.study.effects import effect, effects, interval
from lowprec.profiling.study.report import write_report
from lowprec.profiling.study.run import ABOUT, ROWS, read_rows

QWEN = SHAPES["qwen2.5-1.5b"]


def test_the_design_holds_the_paper_and_every_combination():
    cells = all_cells(QWEN, reduced=False)
    assert len(cells) == len({cell.key for cell in cells}) == 3 * 3 * 3 * 2 * 2 + 4 * 9
    assert len(factorial(QWEN, reduced=False)) == 108
    for row in PAPER:
        same = [c for c in cells if c.stack == PLAIN and all(getattr(c, n) == row[n] for n in
                ("optimizer", "dtype", "batch", "length"))]  # fmt: skip
        assert {c.weights for c in same} == {"lora", "qlora"}
    assert QWEN.limit_on(True) == 8 and SHAPES["tiny"].limit_on(True) is None, "CUDA's context alone is larger"
    reduced = all_cells(QWEN, reduced=True)
    assert len(reduced) < 45 and {c.optimizer for c in reduced} == {OPTIMIZERS[0], OPTIMIZERS[-1]}


def rows_of(speed, memory=lambda cell: 4.0, status=lambda cell: "ok"):
    return [
        {"key": cell.key, **cell.to_dict(), "status": status(cell), "tokens_per_second": speed(cell),
         "peak_vram_gib": memory(cell)}
        for cell in all_cells(QWEN, reduced=False)
    ]  # fmt: skip


def test_effects_recover_what_was_put_in_and_lost_cells_are_counted():
    def speed(cell: Cell) -> float:
        noise = 1 + 0.02 * np.sin(crc32(cell.key.encode()))  # the same in every process, unlike hash()
        return 500.0 * cell.batch * (0.8 if cell.weights == "qlora" else 1) * noise

    rows = rows_of(
        speed,
        memory=lambda cell: 2.0 + cell.batch * cell.length / 1024,
        status=lambda cell: "out_of_memory" if cell.batch * cell.length > 4096 else "ok",
    )
    qlora = effect([row for row in rows if row["stack"] == PLAIN], "weights", "lora", "qlora")
    assert qlora.speed is not None and qlora.speed[1] < 0.8 < qlora.speed[2] and qlora.pairs == 48 and qlora.lost == 0
    by_name = {(e.factor, e.before, e.after): e for e in effects(rows)}
    doubled = by_name["batch", 2, 4]
    assert doubled.lost == 12 and doubled.pairs == 24
    assert doubled.memory_gib == pytest.approx((1.5, 1.25, 1.75), abs=0.3)
    assert ("optimizer", "adamw", "paged_adamw_8bit") in by_name


def test_an_interval_is_the_mean_and_what_surrounds_it():
    assert interval(np.array([])) is None
    mean, low, high = interval(np.arange(100.0))
    assert mean == 49.5 and 43 < low < 46 and 53 < high < 56


@pytest.mark.parametrize(
    ("paged", "bf16", "expected"),
    [
        (1.25, 0.573, ["holds", "holds", "holds"]),
        (1.05, 0.9, ["holds in part", "holds in part", "holds"]),
        (1.0, 1.0, ["does not hold", "does not hold", "holds"]),
        (0.9, 1.1, ["does not hold", "does not hold", "holds"]),
    ],
)
def test_verdicts_follow_the_intervals(paged, bf16, expected):
    def speed(cell: Cell) -> float:
        return 500.0 * (paged if "paged" in cell.optimizer else 1) * (bf16 if cell.dtype == "bf16" else 1)

    assert [verdict.verdict for verdict in verdicts(rows_of(speed))] == expected
    nothing = verdicts([])
    assert [verdict.verdict for verdict in nothing] == ["not decided"] * 3


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.3], "not decided"),
        ([1.3, 1.2], "holds"),
        ([0.9, 1.0, 1.6], "not decided"),
        ([0.9, 1.1, 1.0], "does not hold"),
        ([0.9, 0.8], "does not hold"),
    ],
)
def test_few_pairs_and_wide_intervals_decide_nothing(ratios, expected):
    cells = {"stack": PLAIN, "weights": "lora", "dtype": "bf16", "batch": 1, "status": "ok", "peak_vram_gib": 1.0}
    rows = [
        cells | {"length": place, "optimizer": optimizer, "tokens_per_second": 100.0 * speed}
        for place, ratio in enumerate(ratios)
        for optimizer, speed in (("adamw", 1.0), ("paged_adamw_8bit", ratio))
    ]
    verdict = verdicts(rows)[0]
    assert verdict.verdict == expected
    assert ("to" in verdict.measured) == (len(ratios) > 1), "one pair has no interval"


def test_what_is_left_when_the_study_is_stopped_or_killed(tmp_path, monkeypatch, capsys):
    """The cell's process ends with the study's: at once at Ctrl-C; before its next cell where the study was killed."""
    cell = Cell(stack=PLAIN, weights="lora", optimizer="adamw", dtype="fp32", batch=1, length=16)
    ended = []

    class Process:
        exitcode = 0

        def __init__(self, **_):
            self.joins = 0

        def start(self):
            pass

        def join(self):
            self.joins += 1
            if self.joins == 1:
                raise KeyboardInterrupt

        def kill(self):
            ended.append(self)

    monkeypatch.setattr(run.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=Process))
    output = StringIO()
    with pytest.raises(KeyboardInterrupt):
        run_study(Console(file=output, width=200), shape="tiny", output=str(tmp_path), cells=[cell])
    assert len(ended) == 1 and "the same command goes on" in output.getvalue()

    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr("lowprec.train.launch.start_accelerator", lambda _: (None, None))
    monkeypatch.setattr(run.multiprocessing, "parent_process", lambda: SimpleNamespace(is_alive=lambda: False))
    run._work([cell], "tiny", str(tmp_path), 1, 2, 1, None)
    assert read_rows(tmp_path) == []
    (tmp_path / "file").touch()
    assert main(["profile", "--study", "consumer_gpu", "--shape", "tiny", "--output", str(tmp_path / "file")]) == 1
    assert "cannot be made" in capsys.readouterr().err


def test_real_cells_of_a_tiny_shape_resume_and_end_in_a_page(tmp_path, capfd):
    plain = {"stack": PLAIN, "optimizer": "adamw_8bit", "dtype": "fp32", "batch": 1, "length": 16}
    cells = [
        Cell(**plain | {"weights": "lora"}),
        Cell(**plain | {"weights": "qlora"}),
        Cell(**plain | {"weights": "int8_hadamard", "stack": OWN, "optimizer": "adamw"}),
        Cell(**plain | {"weights": "lora", "length": 2048, "batch": 2}),
        Cell(**plain | {"weights": "no_such_scheme", "stack": OWN}),
    ]
    folder = tmp_path / "study"
    folder.mkdir()
    before = {"key": cells[0].key, **cells[0].to_dict(), "status": "ok", "tokens_per_second": 100.0}
    (folder / ROWS).write_text(json.dumps(before) + '\n{"key": "cut o')  # killed in the middle of a line
    output = StringIO()
    run_study(Console(file=output, width=200), shape="tiny", output=str(folder), warmup=1, steps=2, cells=cells)
    rows = {row["key"]: row for row in read_rows(folder)}
    assert set(rows) == {cell.key for cell in cells} and "5 cells, 1 of them" in output.getvalue()
    assert [rows[cell.key]["status"] for cell in cells] == ["ok", "ok", "ok", "out_of_memory", "failed"]
    assert 0 < rows[cells[1].key]["peak_vram_gib"] < SHAPES["tiny"].limit_gib, "of tensors, where there is no GPU"
    assert rows[cells[1].key]["tokens_per_second"] > 0 and "no_such_scheme" in rows[cells[4].key]["error"]
    assert capfd.readouterr().out.count("tokens/s") == 2  # a line a cell
    page = (folder / "consumer_gpu.md").read_text()
    assert (
        "Nothing here can be compared" in page
        and "3 ran, 1 ran out of memory, 1 failed" in page
        and "| weights | lora | qlora |" in page
    )
    assert (folder / "cells.csv").read_text().count("\n") == len(cells) + 1
    for plot in ("consumer_gpu_memory.png", "consumer_gpu_effects.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--output"):
        run_study(Console(quiet=True), shape="tiny", output=str(folder), warmup=1, steps=3, cells=cells)


def test_the_page_of_the_whole_study(tmp_path):
    rows = rows_of(lambda cell: 400.0 + cell.batch, status=lambda cell: "out_of_memory" if cell.batch == 4 else "ok")
    (tmp_path / ROWS).write_text("".join(json.dumps(row | {"seconds": 1.0}) + "\n" for row in rows))
    about = {"shape": "qwen2.5-1.5b", "warmup": 10, "steps": 50, "date": "2026-11-24", "versions": {"torch": "2"},
             "hardware": {"gpus": [{"name": "Card"}], "cores": 1}}  # fmt: skip
    (tmp_path / ABOUT).write_text(json.dumps(about))
    write_report(tmp_path)
    page = (tmp_path / "consumer_gpu.md").read_text()
    assert page.count("\n| 1 | ") == page.count("\n| 2 | ") == 2 and "| 500.3 |" in page and "Card" in page
    assert "can be compared with the paper;" in page
    assert "Repeat: `lowprec profile --study consumer_gpu --shape qwen2.5-1.5b`" in page


def test_a_reduced_study_is_repeated_reduced(tmp_path):
    run_study(Console(quiet=True), shape="tiny", reduced=True, output=str(tmp_path), cells=[])
    page = (tmp_path / "consumer_gpu.md").read_text()
    assert "Repeat: `lowprec profile --study consumer_gpu --shape tiny --reduced`" in page


@pytest.mark.gpu
def test_cells_of_the_real_shape_under_eight_gib(tmp_path):
    cells = [
        Cell(stack=PLAIN, weights="qlora", optimizer="paged_adamw_8bit", dtype="fp16", batch=1, length=512),
        Cell(stack=OWN, weights="fp8", optimizer="adamw", dtype="bf16", batch=1, length=512),
    ]
    run_study(Console(quiet=True), output=str(tmp_path), warmup=1, steps=2, cells=cells)
    for row in read_rows(tmp_path):
        assert row["status"] == "ok" and 0 < row["peak_vram_gib"] < 8
