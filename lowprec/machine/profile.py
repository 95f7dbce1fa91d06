"""This machine's measured profile: a JSON file, format 1, which ``plan``, ``doctor`` and reports read.

``{"format": 1, "written": ISO time, "versions": {...}, "machine": the fields of Machine, "limits": {...},
"repeat_error": how much the same product differs when it is timed again, "products": {kind: [[m, n, k, ms, layer],
...]}, "validation": {kind: fields of Validation}, "corrections": {kind: fields of Correction}}``.
"""

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lowprec.errors import UserError
from lowprec.machine.correction import Correction, Sample, Validation, fit
from lowprec.machine.machine import Machine

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What ``doctor --measure`` found."""

    machine: Machine
    products: Mapping[str, Sequence[Sample]]
    validation: Mapping[str, Validation]
    repeat_error: float
    limits: Mapping[str, Any]
    """``pinned_gib`` (None without a GPU), ``disk_path``, ``disk_direct``, ``disk_block_mib``, ``disk_threads``,
    ``kinds_refused`` (kind -> why its products were not timed)."""
    versions: Mapping[str, str]
    written: str

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        machine = {f.name: getattr(self.machine, f.name) for f in fields(Machine) if f.name != "corrections"}
        return {
            "format": FORMAT,
            "written": self.written,
            "versions": dict(self.versions),
            "machine": machine,
            "limits": dict(self.limits),
            "repeat_error": self.repeat_error,
            "validation": {kind: asdict(found) for kind, found in self.validation.items()},
            "corrections": {kind: found.to_dict() for kind, found in self.machine.corrections.items()},
            "products": {kind: [list(sample) for sample in samples] for kind, samples in self.products.items()},
        }

    def write(self, path: Path) -> None:
        """Whole or not at all: a reader never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        partial.replace(path)


def read_profile(path: Path) -> Profile:
    """Raises UserError where the file is damaged or of another format."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']}, not {FORMAT}")
        products = {kind: [Sample(*sample) for sample in samples] for kind, samples in stored["products"].items()}
        fields_ = stored["machine"]
        fields_ |= {"capability": fields_["capability"] and tuple(fields_["capability"])}
        plain = Machine(**fields_ | {"assumed": tuple(fields_["assumed"])})
        corrections = {kind: Correction.from_dict(found) for kind, found in stored.get("corrections", {}).items()}
        # Older profiles have none. Where several processes read one at a time, the threads
        # of numpy's solver hinder each other: a third of a second became four, and minutes on 16 cores.
        corrections |= {
            kind: fit(kind, samples, plain.rates(kind)) for kind, samples in products.items() if kind not in corrections
        }
        return Profile(
            machine=Machine(**fields_ | {"assumed": plain.assumed, "corrections": corrections}),
            products=products,
            validation={kind: Validation(**found) for kind, found in stored["validation"].items()},
            repeat_error=stored["repeat_error"],
            limits=stored["limits"],
            versions=stored["versions"],
            written=stored["written"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a machine profile that can be read ({error}): lowprec doctor --measure"
        ) from error


def profile_folder() -> Path:
    """``$XDG_CACHE_HOME/lowprec/machines``, or ``~/.cache/lowprec/machines``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec" / "machines"


def profile_path() -> Path:
    """The profile of this machine, named after its first GPU, or after its processor where it has none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return profile_folder() / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.json"


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def this_machine() -> Machine | None:
    """This machine as ``lowprec doctor --measure`` found it; None where that never ran.

    Raises:
        UserError: its profile is damaged, or of another version.
    """
    path = profile_path()
    return _cached(path, path.stat().st_mtime_ns).machine if path.is_file() else None


@lru_cache(maxsize=4)
def _cached(path: Path, changed: int) -> Profile:
    return read_profile(path)
