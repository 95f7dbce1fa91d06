"""The GPU benchmarks refuse a machine without a GPU; the accuracy benchmark measures what the layers compute."""

import json

import pytest
import torch
from rich.console import Console

from lowprec.bench import linear, matmul, rotate
from lowprec.bench.accuracy import SCHEMES, noise, plot, record
from lowprec.bench.measure import BenchResult
from lowprec.errors import UserError
from lowprec.testing import tiny_model


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("bench", [linear, matmul, rotate])
def test_no_gpu_is_said_at_once(bench):
    with pytest.raises(UserError, match="no CUDA device"):
        bench.run()


def test_accuracy_of_every_linear(tmp_path):
    model = tiny_model("llama")
    ids = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))
    layers = record(model, ids)
    assert len(layers) == 14 and all(x.shape[0] == error.shape[0] == 32 for _, x, error in layers.values())
    by_layer = {name: noise(*found) for name, found in layers.items()}
    figures = {scheme: {layer: found[scheme] for layer, found in by_layer.items()} for scheme in SCHEMES}
    assert all(value > 20 for layers in figures.values() for found in layers.values() for value in found.values())
    first = next(iter(by_layer.values()))
    assert first["int8_hadamard"]["output median"] > first["fp8"]["output median"] + 6
    plot(figures, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_results_print_and_write_json(tmp_path):
    result = BenchResult("t", [{"pass": "a", "ms": 0.1234}, {"pass": "b", "ms": 123.4, "share": None}], ["note"])
    console = Console(width=80)
    with console.capture() as capture:
        console.print(result)
    assert "0.123" in capture.get() and "123" in capture.get() and "note" in capture.get()
    result.write_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["ms"] == 0.1234


@pytest.mark.gpu
def test_a_layer_is_timed_in_every_scheme():
    result = linear.run(tokens=256, layers=((256, 512),))
    assert {row["scheme"] for row in result.rows} >= {"bf16", "fp8", "int8_hadamard", "fp8, one", "int8_hadamard, both"}
    assert all(row["graph"] > 0 and row["eager"] > 0 for row in result.rows)
