"""``-m key=a,b`` trains every combination in a folder of its own."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from lowprec.cli import main
from lowprec.errors import UserError
from lowprec.run_folder import read_report
from lowprec.sweep import combinations
from lowprec.testing import save_tiny


def test_combinations_follow_hydra_s_grammar():
    runs = combinations(["adapter.r=4,8", "train.seed=range(1,3)", "data.path=x"])
    assert len(runs) == 4 and all("data.path=x" in run for run in runs)
    assert {tuple(run[:2]) for run in runs} == {(f"adapter.r={r}", f"train.seed={s}") for r in (4, 8) for s in (1, 2)}


def test_a_sweep_trains_every_combination(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_tiny(tmp_path / "model", "llama")
    rows = [{"prompt": f"Count {n}.", "completion": "one two three"} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = main([
        "train", "lora", f"model.model_name_or_path={tmp_path / 'model'}", f"data.path={tmp_path / 'data.jsonl'}",
        "model.dtype=fp32", "train.max_steps=1", "train.report_to=[]", f"train.output_dir={tmp_path / 'sweep'}",
        f"data.cache_dir={tmp_path / 'cache'}", "-m", "adapter.r=2,4",
    ])  # fmt: skip
    assert code == 0
    for r in (2, 4):
        assert read_report(tmp_path / "sweep" / f"adapter.r={r}")["status"] == "finished"
    assert "held-out loss" in capfd.readouterr().out


def test_a_mistake_in_any_combination_is_found_before_the_first_run(tmp_path):
    with pytest.raises(UserError, match="weights"):
        main(["train", "lora", "model.model_name_or_path=m", "data.path=d", f"train.output_dir={tmp_path / 's'}",
              "-m", "weights=bf16,nf5", "--debug"])  # fmt: skip
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_run_the_time_to_save(number):
    """The child saves for a second after a signal; a terminal sends Ctrl-C to both, a scheduler SIGTERM to us alone."""
    child = f"""
import signal, sys, time
signal.signal({int(number)}, lambda *_: (time.sleep(1), sys.exit(75)))
print("ready", flush=True)
time.sleep(60)
"""
    sweep = f"import sys; from lowprec.sweep import _exit_code; print(_exit_code([sys.executable, '-c', {child!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", sweep], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            assert process.communicate(timeout=60)[0] == "75\n"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
