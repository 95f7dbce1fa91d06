"""The shipped recipes: list, show, copy."""

from pathlib import Path

import lowprec_recipes

from lowprec.errors import UserError

SHIPPED = Path(lowprec_recipes.__file__).parent


def shipped_recipes() -> list[str]:
    """Names of the primary recipes, sorted."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, its header included.

    Raises:
        UserError: there is no such recipe.
    """
    if name not in shipped_recipes():
        raise UserError(f"There is no recipe '{name}'. The shipped ones are: {', '.join(shipped_recipes())}.")
    return (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")


def purpose(name: str) -> str:
    """The first comment line of a recipe: what it is for."""
    return recipe_text(name).splitlines()[0].lstrip("# ")


def copy_recipe(name: str, target: str) -> Path:
    """Write a shipped recipe to a file of the user's own.

    Args:
        target: a ``.yaml`` path whose name no shipped recipe has; missing folders are made.

    Raises:
        UserError: the target exists, or would be confused with a shipped recipe.
    """
    path = Path(target)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{target} must end in .yaml.")
    if path.stem in shipped_recipes():
        raise UserError(
            f"{target} would have the name of a shipped recipe. Choose another, for example my_{path.name}."
        )
    if path.exists():
        raise UserError(f"{target} exists already. Choose another name, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe_text(name), encoding="utf-8")
    return path
