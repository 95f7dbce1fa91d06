"""The GPU benchmarks refuse a machine without a GPU; the accuracy benchmark measures what the layers compute."""

import json

import pytest
import torch
from rich.console import Console

from lowprec.bench import linear, matmul, rotate
from lowprec.bench.accuracy import SCHEMES, noise, plot, record
from lowprec.bench.measure import BenchResult
from lowprec.errors import UserError
from lowprec.layers.eight_bit_schemes import Fp8, Int8Hadamard
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
    schemes = {row["scheme"] for row in result.rows}
    assert schemes >= {"bf16", "fp8", "fp8, weight cast before", "int8_hadamard", "fp8, one", "int8_hadamard, both"}
    assert all(row["graph"] > 0 and row["eager"] > 0 for row in result.rows)
    ours = [row for row in result.rows if row["scheme"].startswith(("bf16", "fp8", "int8"))]
    assert all(0 < row["products"] < 2 * row["graph"] for row in ours)


@pytest.mark.gpu
def test_break_even_of_a_small_layer():
    result = linear.break_even((128, 256), ((256, 512),))
    assert [row["weight"] for row in result.rows] == ["trained", "trained", "frozen", "frozen"]
    assert all(row["128"] > 0 and row["pays from"] in (128, 256, "nowhere") for row in result.rows)


@pytest.mark.parametrize(
    "speeds,least", [({1: 0.9, 2: 1.1, 3: 1.2}, 2), ({1: 1.1, 2: 0.9, 3: 1.2}, 3), ({1: 0.5, 2: 0.9}, "nowhere")]
)
def test_where_a_scheme_pays_it_pays_from_there_on(speeds, least):
    assert linear._pays_from(speeds) == least


@pytest.mark.parametrize("scheme", [Fp8(), Int8Hadamard()], ids=str)
def test_the_step_on_codes_is_the_layers_own(scheme):
    plain = torch.nn.Linear(64, 48, bias=False).bfloat16()
    layer = scheme.convert(plain, False)
    x, error = torch.randn(32, 64).bfloat16().requires_grad_(), torch.randn(32, 48).bfloat16()
    expected, found = linear._step(layer, x, error, False)(), linear._step_on_codes(layer, x, error)()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
