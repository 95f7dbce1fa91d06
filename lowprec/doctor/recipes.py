"""What the shipped recipes ask for, and what ``plan`` and reports know of this machine."""

from collections.abc import Iterator
from functools import partial

from lowprec.doctor.check import Check, attempt
from lowprec.machine.profile import profile_path, read_profile
from lowprec.report import versions

GROUP = "lowprec"


def check_recipes() -> Iterator[Check]:
    """Every shipped recipe composes and is accepted; the machine's profile is there and new enough."""
    from lowprec.recipes import shipped_recipes

    for name in shipped_recipes():
        remedy = "Install lowprec anew: its files or Hydra are damaged."
        yield attempt(GROUP, f"recipe {name}", partial(_composes, name), remedy=remedy, required=True)
    remedy = "lowprec doctor --measure (90 s), so that lowprec plan knows this machine's speed."
    yield attempt(GROUP, "machine profile", _profile, remedy=remedy)


def _composes(name: str) -> str:
    from lowprec.config import resolve

    recipe, _ = resolve(name, ["model.model_name_or_path=some/model", "data.path=some.jsonl"])
    return f"weights {recipe.choice('weights')}, adapter {recipe.choice('adapter')}"


def _profile() -> str:
    path = profile_path()
    if not path.is_file():
        raise RuntimeError("this machine was never measured")
    profile = read_profile(path)
    measured, here = profile.versions.get("torch"), versions()["torch"]
    if measured != here:
        raise RuntimeError(f"it was measured with PyTorch {measured}, this is {here}")
    errors = ", ".join(f"{kind} {100 * found.median_error:.0f} %" for kind, found in profile.validation.items())
    return f"{path}, of {profile.written[:10]}; unseen products are predicted within (median) {errors}"
