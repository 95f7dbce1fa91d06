"""Runs of a benchmark in processes of their own, with the packages of a peer; their figures as JSON lines."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "torchao")


def read(results: Path) -> list[dict]:
    """The rows so far, the newest of each run last. A line that was cut off by an end is left out."""
    rows = []
    if results.is_file():
        for line in results.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def figures_of(module: str, arguments: Sequence[str], peer: str, log: Path, left: float | None) -> tuple[dict, float]:
    """What ``python -m module arguments`` prints as its last line of JSON, which begins with ``status``; its seconds.

    Args:
        peer: sees the packages of its own folders, too (``path_of``).
        log: written where the process fails.
        left: seconds after which it is ended.
    """
    environment = dict(os.environ)
    path = path_of(peer)
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([*path, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", module, *arguments]
        try:
            code = subprocess.run(command, stdout=output, stderr=errors, env=environment, timeout=left).returncode
        except subprocess.TimeoutExpired:
            return {"status": "time is up"}, time.monotonic() - begin
        output.seek(0)
        errors.seek(0)
        lines, trouble = output.read().splitlines(), errors.read()
    found = next((line for line in reversed(lines) if line.startswith('{"status"')), None)
    if code == 0 and found is not None:
        return json.loads(found), time.monotonic() - begin
    last = next((line for line in reversed(trouble.splitlines()) if line.strip()), f"exit code {code}")
    log.write_text(trouble, encoding="utf-8")
    return {"status": "failed", "error": last[:500]}, time.monotonic() - begin


def path_of(peer: str) -> list[str]:
    """Folders of packages that only this peer shall see: ``$LOWPREC_PEER_PATH_UNSLOTH`` and so on."""
    name = "LOWPREC_PEER_PATH_" + peer.upper().replace("+", "_")
    return [part for part in os.environ.get(name, "").split(os.pathsep) if part]


def versions(path: Sequence[str] = ()) -> dict[str, str]:
    """Of the packages that a process sees which looks into the folders ``path`` first."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        distribution = next(iter(distributions(name=package, path=[*path, *sys.path])), None)
        if distribution is not None:
            found[package] = distribution.version
    return found
