"""A run that saves checkpoints as training does, and a supervisor that kills it at random moments and starts it again.

    python -m tests.optim.killed_run FOLDER KILLS OPTIONS

Each life is a fork of the supervisor, which has torch loaded and no thread started, so that it costs milliseconds.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lowprec.optim import AdamW
from tests.optim.training import backward, make_model

STEPS = 24
SAVE_EVERY = 4
SSD = {"state_store": "ssd", "chunk_bytes": 20_000, "pinned_gib": 0.0005}


def live(folder: Path, options: dict) -> None:
    """Resume from the newest checkpoint in ``folder``, or begin; write ``final.safetensors`` at the end."""
    torch.set_num_threads(1)
    model = make_model(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), lr=1e-2, path=folder / "states", **SSD, **options)
    optimizer.update_in_backward()
    done = sorted(path for path in folder.glob("step-*") if (path / "progress.json").exists())
    start = 0
    if done:
        model.load_state_dict(load_file(done[-1] / "model.safetensors"))
        optimizer.load_states(done[-1] / "optimizer")
        start = json.loads((done[-1] / "progress.json").read_text())
    for step in range(start, STEPS):
        (folder / "at").write_text(str(step))
        backward(model, step)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            save(folder, step + 1, model, optimizer)
    optimizer.close()
    save_file(model.state_dict(), folder / "final.safetensors")


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: AdamW) -> None:
    temporary, final = folder / f"writing-{os.getpid()}", folder / f"step-{step:03d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    optimizer.save_states(temporary / "optimizer")
    save_file(model.state_dict(), temporary / "model.safetensors")
    (temporary / "progress.json").write_text(json.dumps(step))
    temporary.rename(final)
    for old in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(old)


def fork(folder: Path, options: dict) -> int:
    child = os.fork()
    if child == 0:
        try:
            live(folder, options)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def wait(child: int, seconds: float) -> int | None:
    """The exit status, or None where the child is still alive after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def supervise(folder: Path, kills: int, longest: float, options: dict) -> dict:
    """Kill the run ``kills`` times, then let it end. Returns the steps it was killed in, and how many lives it had.

    A life that is to be killed lasts ``longest`` seconds at most at first; the time follows how far the lives come.
    """
    chance = random.Random(0)
    folder.mkdir()
    killed_at, lives = [], 0
    while True:
        lives += 1
        child = fork(folder, options)
        status = wait(child, chance.uniform(0, longest) if len(killed_at) < kills else 120)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed_at.append((folder / "at").read_text() if (folder / "at").exists() else "")
            longest *= 1.1
            continue
        if status != 0:
            raise SystemExit("a life ended with an error")
        if len(killed_at) >= kills:
            return {"killed_at": killed_at, "lives": lives}
        for checkpoint in folder.glob("step-*"):  # it came to its end: once more from the beginning
            shutil.rmtree(checkpoint)
        longest /= 2


def load_lazy_modules() -> None:
    """What torch imports at the first step takes longer than a life."""
    model = make_model(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), state_dtype="int8")
    backward(model, 0)
    optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    load_lazy_modules()
    base, num_kills, store_options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    begin = time.monotonic()
    supervise(base / "undisturbed", 0, 0, store_options)
    half_a_life = (time.monotonic() - begin) / 2
    print(json.dumps(supervise(base / "killed", num_kills, half_a_life, store_options)))
