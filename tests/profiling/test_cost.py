"""What probing costs, measured as the documentation says."""

import pytest

from lowprec.profiling.cost import main, probe_cost
from tests.train.conftest import arguments, fresh_accelerate, tiny  # noqa: F401  fixtures


def last_wins(pairs: list[str]) -> list[str]:
    return [f"{key}={value}" for key, value in dict(pair.split("=", 1) for pair in pairs).items()]


def test_the_host_spends_little_in_the_probes(arguments):  # noqa: F811
    overrides = last_wins(arguments("train.gradient_accumulation_steps=1"))
    found = probe_cost("full", overrides, warmup=1, blocks=2, steps=2)
    assert found["step_ms"] > 0 and 0 < found["host_share"] < 0.5


def test_the_command_has_help_and_tells_mistakes(monkeypatch, capsys):
    for words, code in ((["--help"], 0), ([], 2), (["no_such_recipe"], "lowprec: There is no recipe")):
        monkeypatch.setattr("sys.argv", ["cost", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == code or str(stop.value.code).startswith(str(code))
    assert "key=value" in capsys.readouterr().out
