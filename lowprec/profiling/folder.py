"""What a profile leaves in its folder, and how it is found again."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowprec.errors import UserError
from lowprec.profiling.figures import SCHEMA
from lowprec.profiling.page import comparison, page

JSON, HTML = "profile.json", "profile.html"


def free_folder(name: str) -> Path:
    """``profiles/<name>``, or with the first number that is free."""
    folder, number = Path("profiles", name), 1
    while folder.exists():
        number += 1
        folder = Path("profiles", f"{name}-{number}")
    return folder


def check_free(folder: Path) -> None:
    """Raises UserError where something is there that a profile would mix with."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is not empty. Choose another folder for the profile (profile.output_dir).")


def made_folder(folder: Path) -> Path:
    """``folder``, made where it is not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made: {error.strerror}. Choose another.") from error
    return folder


def write(figures: dict[str, Any], folder: Path, files: Sequence[Path] = ()) -> Path:
    """Write the figures and their page, and copy ``files`` beside them.

    Raises:
        UserError: the folder is not empty, or cannot be made.
    """
    check_free(folder)
    made_folder(folder)
    for file in files:
        shutil.copy(file, folder / file.name)
    figures = figures | {"files": [JSON, *(file.name for file in files)]}
    (folder / JSON).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / HTML).write_text(page(figures), encoding="utf-8")
    return folder


def read(path: str) -> dict[str, Any]:
    """The figures of a profile, from its folder or its ``profile.json``.

    Raises:
        UserError: there is none, or it is of another version of lowprec.
    """
    file = Path(path) / JSON if Path(path).is_dir() else Path(path)
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no profile: {file} cannot be read. Make one with lowprec profile RECIPE."
        ) from error
    if not isinstance(figures, dict) or figures.get("schema") != SCHEMA:
        raise UserError(f"{file} is not a profile that this version of lowprec reads. Make it again.")
    return figures


def read_two(one: str, other: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two profiles to be shown side by side; where both are of one recipe, they are named by their paths.

    Raises:
        UserError: one of them is no profile.
    """
    first, second = read(one), read(other)
    if first["name"] == second["name"]:
        first, second = first | {"name": one.rstrip("/")}, second | {"name": other.rstrip("/")}
    return first, second


def write_comparison(first: dict[str, Any], second: dict[str, Any], target: Path) -> Path:
    """Write the page of two profiles, in its folder; returns ``target``.

    Raises:
        UserError: it cannot be written.
    """
    made_folder(target.parent)
    try:
        target.write_text(comparison(first, second), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}). Name a file with --output.") from error
    return target
