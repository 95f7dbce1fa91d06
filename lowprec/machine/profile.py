"""Where this machine's measured profile lies, and how it becomes a ``Machine``."""

import json
import os
import re
from pathlib import Path

import torch

from lowprec.machine.machine import Machine


def profile_folder() -> Path:
    """``$XDG_CACHE_HOME/lowprec/machines``, or ``~/.cache/lowprec/machines``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec" / "machines"


def profile_path() -> Path:
    """The profile of this machine: named after its first GPU, or ``cpu``."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return profile_folder() / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.json"


def this_machine() -> Machine | None:
    """This machine as ``lowprec doctor --measure`` found it; None where that never ran."""
    path = profile_path()
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))["machine"]
    return Machine(**stored | {"capability": stored["capability"] and tuple(stored["capability"])})
