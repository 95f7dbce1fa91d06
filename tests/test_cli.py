"""The command line as its user meets it: help, mistakes, exit codes. Heavy verbs have tests of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lowprec
from lowprec.cli import main
from lowprec.recipes import shipped_recipes

VERBS = ["train", "plan", "profile", "recipes", "merge", "doctor", "bench", "ssd", "completion"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_examples(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and f"lowprec {verb}" in printed


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert lowprec.__version__ in capsys.readouterr().out


def test_recipes(capsys, tmp_path):
    assert main(["recipes", "ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped_recipes())
    assert main(["recipes", "show", "lora"]) == 0
    assert "#   lowprec train lora" in capsys.readouterr().out
    target = tmp_path / "my_lora.yaml"
    assert main(["recipes", "cp", "lora", str(target)]) == 0
    capsys.readouterr()
    assert main(["recipes", "show", str(target), "adapter.r=3", "model.model_name_or_path=m", "data.path=d"]) == 0
    assert "r: 3" in capsys.readouterr().out
    assert main(["recipes", "show", str(target), "lora_r=3", "model.model_name_or_path=m", "data.path=d"]) == 0
    shown = capsys.readouterr()
    assert "r: 3" in shown.out and "lora_r is called adapter.r here" in shown.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "nothing"], "quickstart"),
        (["train", "lora", "data.path=x"], "model.model_name_or_path"),
        (["train", "lora", "lr=1e-4", "optimizer.learning_rate=2e-4"], "optimizer.learning_rate"),
        (["train", "lora", "-m", "train.max_step=1,2"], "train.max_steps"),
        (["train", "lora", "model.model_name_or_path=m", "data.path=d", "-m", "train.output_dir=a,b"], "one value"),
        (["recipes", "show"], "quickstart"),
        (["recipes", "cp", "lora"], "target"),
        (["recipes", "show", "nope"], "quickstart"),
        (["merge", "not_a_folder", "out"], "not_a_folder"),
        (["bench", "ssd"], "--path"),
        (["bench", "step", "--works", "nothing"], "packed_attention"),
        (["ssd", "clean", "not_a_folder"], "not_a_folder"),
        (["ssd", "export", "not_a_folder"], "target"),
        (["ssd", "export", "not_a_folder", "out"], "not_a_folder"),
    ],
)
def test_mistakes_are_one_paragraph_without_a_traceback(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert named in printed and "Traceback" not in printed
    assert printed.startswith("lowprec:") and printed.strip().count("\n") == 0


@pytest.mark.parametrize(("verb", "told"), [("train", "since the last checkpoint"), ("plan", "stopped at once.")])
def test_ctrl_c_speaks_of_checkpoints_where_there_are_some(verb, told, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowprec.config.resolve", interrupted)
    monkeypatch.setattr("lowprec.plan.plan", interrupted)
    assert main([verb, "quickstart"]) == 130
    assert told in capsys.readouterr().err


def test_debug_shows_the_traceback():
    with pytest.raises(lowprec.errors.UserError):
        main(["train", "nothing", "--debug"])


@pytest.mark.parametrize("arguments", [["train", "lora", "--max-steps", "3"], ["doctor", "extra"], []])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_importing_the_package_touches_neither_cuda_nor_triton():
    """In a process of its own: whatever other tests imported does not count."""
    code = (
        "import json, sys, lowprec\n"
        "print(json.dumps([m for m in ('torch', 'triton', 'transformers', 'bitsandbytes') if m in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


def test_the_installed_command_and_the_module_are_the_same():
    for command in ([Path(sys.executable).with_name("lowprec")], [sys.executable, "-m", "lowprec"]):
        path = subprocess.run([*command, "recipes", "ls"], capture_output=True, text=True, check=False)
        assert path.returncode == 0 and "quickstart" in path.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_offers_recipes(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    if shell == "bash":
        ask = script + '\nCOMP_WORDS=(lowprec train qu); COMP_CWORD=2; _lowprec; echo "${COMPREPLY[@]}"'
        result = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "quickstart"
        ask = script + '\nCOMP_WORDS=(lowprec ""); COMP_CWORD=1; _lowprec; echo "${COMPREPLY[@]}"'
        result = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert result.stdout.split() == VERBS
    else:
        assert "bashcompinit" in script


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_missing_recipe_is_all_that_is_missing(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb])
    assert capsys.readouterr().err.rstrip().endswith("the following arguments are required: recipe")
