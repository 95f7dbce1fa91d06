"""SIGKILL at random moments, in a write-back or a checkpoint too: the run ends with the undisturbed run's bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize(("kills", "options"), [(30, {}), (8, {"state_dtype": "int8", "reserve_checkpoints": 0})])
def test_a_killed_run_ends_bit_identical(tmp_path, kills, options):
    command = [sys.executable, "-m", "tests.optim.killed_run", str(tmp_path), str(kills), json.dumps(options)]
    root, environment = Path(__file__).parents[2], os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert len(facts["killed_at"]) == kills
    assert kills < 30 or len(set(facts["killed_at"])) >= 5, f"the kills were not spread over the run: {facts}"
    expected, found = (load_file(tmp_path / name / "final.safetensors") for name in ("undisturbed", "killed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
