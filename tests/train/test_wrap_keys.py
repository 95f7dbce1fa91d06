"""The recipe's group ``wrap``: rules and calibration."""

import pytest

from lowprec.config import resolve
from lowprec.errors import UserError
from lowprec.run_folder import read_report
from tests.train.conftest import run

NOTHING = ["model.model_name_or_path=x", "data.path=y"]


def schemes(report: dict) -> dict[str, str]:
    return {row["name"].split(".")[-1]: row["scheme"] for row in report["wrap"]["linears"]}


def test_rules_reach_the_layers_and_bind_a_resumed_run(arguments, tmp_path):
    rules = (
        "weights=int8_hadamard",
        "wrap.rules=[*.o_proj:bf16,lm_head:fp8]",
        "train.max_steps=2",
        "train.save_steps=1",
    )
    run("lora", arguments(*rules))
    found = schemes(read_report(tmp_path / "run"))
    assert (found["o_proj"], found["lm_head"], found["q_proj"]) == ("bf16", "fp8", "int8_hadamard")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    other = (*rules, "wrap.rules=[*.o_proj:bf16]", f'train.resume_from_checkpoint="{checkpoint}"')
    with pytest.raises(UserError, match=r"made by another recipe: wrap\.rules"):
        run("lora", arguments(*other, output="again"))


def test_auto_judges_noise_on_samples_of_the_data(arguments, tmp_path, monkeypatch):
    """bf16 is made to look slow, so that the noise decides, and the reason says on what it was measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    times = {"bf16": 9.0, "fp8": 2.0, "fp8_hadamard": 3.0, "int8_hadamard": 4.0}
    monkeypatch.setattr("lowprec.layers.auto.remembered_times", lambda *arguments: times)
    for samples, said in ((3, False), (0, True)):
        more = ("weights=auto", f"wrap.calibration_samples={samples}", "train.max_steps=1")
        run("lora", arguments(*more, output=f"run-{samples}"))
        rows = [row for row in read_report(tmp_path / f"run-{samples}")["wrap"]["linears"] if row["scheme"] == "fp8"]
        assert rows and all(("on normal numbers" in row["reason"]) == said for row in rows)


def test_a_resumed_run_keeps_what_auto_chose_whatever_is_faster_now(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    times = {"bf16": 9.0, "fp8": 2.0, "fp8_hadamard": 3.0, "int8_hadamard": 4.0}
    monkeypatch.setattr("lowprec.layers.auto.remembered_times", lambda *arguments: times)
    run("lora", arguments("weights=auto", "train.max_steps=2", "train.save_steps=1"))
    before = read_report(tmp_path / "run")["wrap"]["linears"]
    assert {row["scheme"] for row in before} >= {"bf16", "fp8"}
    times = {"bf16": 1.0, "fp8": 2.0, "fp8_hadamard": 3.0, "int8_hadamard": 4.0}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    again = ("weights=auto", "train.max_steps=2", f'train.resume_from_checkpoint="{checkpoint}"')
    run("lora", arguments(*again, output="again"))
    after = read_report(tmp_path / "again")["wrap"]["linears"]
    assert [(row["name"], row["scheme"], row["kernel"]) for row in after] == [
        (row["name"], row["scheme"], row["kernel"]) for row in before
    ]
    assert any(row["reason"] == "as it was chosen before" for row in after)
    monkeypatch.setattr("lowprec.layers.eight_bit_schemes.EightBit.why_not", lambda *arguments: "this GPU has no e4m3")
    with pytest.raises(UserError, match=r"was fp8 in .*step-1 and is bf16 here \(this GPU has no e4m3\)"):
        run("lora", arguments(*again, output="elsewhere"))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["wrap.rules=[o_proj]"], "names no scheme"),
        (["wrap.rules=[*:fp9]"], "fp9"),
        (["wrap.rules=[*:nf4]", "adapter=none"], "cannot be trained"),
        (["wrap.calibration_samples=-1"], "0 or more"),
        (["wrap.calibration_samples=2", "weights=fp8"], "has no effect"),
    ],
)
def test_mistakes_are_named(overrides, named):
    with pytest.raises(UserError, match=named):
        resolve("lora", [*NOTHING, *overrides])


def test_a_rule_that_names_the_recipes_scheme_means_it_with_its_fields():
    recipe, _ = resolve(
        "lora",
        [
            "model.model_name_or_path=x",
            "data.path=y",
            "weights=fp8",
            "weights.layout=both",
            "wrap.rules=[a:fp8,b:bf16]",
        ],
    )
    found = recipe.wrap.schemes(recipe.weights)
    assert found["a"] is recipe.weights and found["b"].option_name == "bf16"
