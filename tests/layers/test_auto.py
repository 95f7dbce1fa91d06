"""``weights=auto``: what the machine's profile rules out is not timed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lowprec.layers import auto
from lowprec.layers.auto import Auto
from lowprec.layers.measured import remembered_times, verdict_folder
from lowprec.machine import named_card


@pytest.fixture
def timed(monkeypatch, tmp_path) -> list[str]:
    """The kinds of layers that were timed; 8-bit ones are twice as fast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: list[str] = []

    def milliseconds_of(layer: nn.Linear, tokens: int, frozen: bool, in_graphs: bool) -> float:
        seen.append(type(layer).__name__)
        return 2.0 if type(layer) is nn.Linear else 1.0

    monkeypatch.setattr(auto, "milliseconds_of", milliseconds_of)
    return seen


def choose(profile, monkeypatch) -> tuple:
    monkeypatch.setattr(auto, "profile_of", lambda device: profile)
    linear = nn.Linear(256, 512, bias=False, dtype=torch.bfloat16)
    model = nn.Sequential(linear)
    return Auto(tokens=64).choose(model, {"0": (linear, True)}, None)["0"]


def test_without_a_profile_every_scheme_is_timed(timed, monkeypatch):
    scheme, reason = choose(None, monkeypatch)
    assert len(timed) == 4 and scheme is not None and "2.00x bf16" in reason


def test_products_that_are_slower_by_the_profile_are_not_timed(timed, monkeypatch):
    card = named_card("H100")
    slow_int8 = replace(card, tflops=card.tflops | {"int8": 1.0})
    scheme, _ = choose(slow_int8, monkeypatch)
    assert len(timed) == 3 and scheme is not None and scheme.option_name == "fp8"
    timed.clear()
    slow = replace(card, tflops=card.tflops | {"int8": 1.0, "fp8": 1.0})
    scheme, reason = choose(slow, monkeypatch)
    assert timed == ["Linear"] and scheme is None
    assert "fp8's products alone take" in reason and "int8_hadamard's products alone take" in reason


def test_a_verdict_kept_without_a_profile_does_not_miss_schemes_later(timed, monkeypatch):
    card = named_card("H100")
    choose(replace(card, tflops=card.tflops | {"int8": 1.0}), monkeypatch)
    scheme, _ = choose(None, monkeypatch)
    assert scheme is not None and len(timed) == 3 + 4


def test_the_profile_of_another_device_says_nothing():
    assert auto.profile_of(torch.device("cpu")) is None


def test_rotated_e4m3_is_not_taken_where_it_is_noisier_than_plain(timed, monkeypatch):
    """Sparse inputs, as of ``v_proj``: the rotation fills the zeros with noise. It is timed as the fastest here."""
    monkeypatch.setattr(auto, "milliseconds_of", lambda layer, *_: 1.0 if is_rotated(layer) else 2.0 + is_plain(layer))

    def is_plain(layer) -> bool:
        return type(layer) is nn.Linear

    def is_rotated(layer) -> bool:
        return not is_plain(layer) and layer.plan.dtype == auto.FP8 and layer.plan.in_block > 1

    torch.manual_seed(0)
    linear = nn.Linear(256, 512, bias=False, dtype=torch.bfloat16)
    x, error = torch.zeros(64, 256, dtype=torch.bfloat16), torch.randn(64, 512, dtype=torch.bfloat16)
    x[:, ::16] = torch.randn(64, 16, dtype=torch.bfloat16).exp() ** 3
    monkeypatch.setattr(auto, "record", lambda *_: {"0": (x, error)})
    scheme, _ = Auto(tokens=64).choose(nn.Sequential(linear), {"0": (linear, True)}, {})["0"]
    assert scheme is not None and scheme.option_name == "fp8"
    monkeypatch.setattr(auto, "layer_noise_db", lambda layer, *_: (30.0 + is_rotated(layer),))
    scheme, _ = Auto(tokens=64).choose(nn.Sequential(linear), {"0": (linear, True)}, {})["0"]
    assert scheme is not None and scheme.option_name == "fp8_hadamard"


@pytest.mark.parametrize("damaged", ["", '{"key": 1', "[]", "null"])
def test_a_damaged_file_of_times_is_measured_again(damaged, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device, times = torch.device("cpu"), {"bf16": 1.0}
    assert remembered_times(device, "a layer", lambda: times) == times
    [file] = verdict_folder().iterdir()
    file.write_text(damaged)
    assert remembered_times(device, "a layer", lambda: {"bf16": 2.0}) == {"bf16": 2.0}
    assert remembered_times(device, "a layer", lambda: times) == {"bf16": 2.0}
