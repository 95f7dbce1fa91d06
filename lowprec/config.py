"""The recipe's schema, and ``resolve()``: the one gate from YAML and ``key=value`` to typed, checked objects."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

import lowprec.adapter  # noqa: F401  registers the options of its group, as do lowprec.layers and lowprec.optim.options
import lowprec.layers  # noqa: F401
from lowprec import overrides as override_rules
from lowprec.data import Data
from lowprec.errors import UserError
from lowprec.model import Model
from lowprec.optim.options import check_schedule
from lowprec.option import option_names
from lowprec.prepare import Wrap
from lowprec.profiling.options import Profile
from lowprec.recipes import SHIPPED, shipped_recipes
from lowprec.train.options import Train

SCHEMA_NAME = "base_recipe"
RECIPE_FILE = "recipe.yaml"


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Everything a run is made of. Groups typed ``Any`` hold one of their registered options."""

    defaults: list[Any] = field(
        default_factory=lambda: [
            "_self_",
            {"model": None},
            {"data": None},
            {"weights": "bf16"},
            {"adapter": "none"},
            {"optimizer": "adamw"},
            {"state_store": "gpu"},
        ]
    )
    name: str = MISSING
    """The recipe's file name without its ending; set by ``resolve``."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    weights: Any = MISSING
    wrap: Wrap = field(default_factory=Wrap)
    adapter: Any = MISSING
    optimizer: Any = MISSING
    state_store: Any = MISSING
    train: Train = field(default_factory=Train)
    profile: Profile = field(default_factory=Profile)

    def choice(self, group: str) -> str:
        """The name of the option chosen in a group: ``recipe.choice("weights") == "nf4"``."""
        return str(getattr(self, group).option_name)

    def to_yaml(self) -> str:
        """A recipe file that composes to this recipe again, whatever the shipped ones become."""
        groups = override_rules.OPTION_GROUPS
        defaults = [SCHEMA_NAME, *({f"override {group}": self.choice(group)} for group in groups), "_self_"]
        values = OmegaConf.to_container(OmegaConf.structured(self), enum_to_str=True)
        assert isinstance(values, dict)
        values.pop("defaults")
        return OmegaConf.to_yaml({"defaults": defaults} | values)


ConfigStore.instance().store(name=SCHEMA_NAME, node=Recipe, provider="lowprec")


def resolve(recipe: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Compose a recipe, check it, and build its typed objects. No weight and no data are touched.

    Args:
        recipe: the name of a shipped recipe, or the path of a YAML file (which may inherit shipped recipes, and whose
            folder may hold presets of its own: ``data/mine.yaml`` is ``data: mine``).
        overrides: ``key=value``, ``group=choice``.

    Returns:
        The recipe, and what the user should be told (aliases that were renamed).

    Raises:
        UserError: unknown keys or choices, wrong types, contradictions between keys.
    """
    parsed = override_rules.parse_overrides(overrides)
    for override in parsed:
        if override.is_sweep_override():
            key, _, values = str(override.input_line).partition("=")
            raise UserError(
                f"'{override.input_line}' sweeps over several values: add -m to run them one by one. One value that is "
                f"a list stands in brackets: '{key}=[{values}]'."
            )
    arguments, messages = override_rules.rename_aliases(parsed)
    with _config_folder(recipe) as (folder, name, search_path, yaml_messages):
        config = _compose_checked(folder, name, search_path, arguments)
    if OmegaConf.is_missing(config, "name"):
        config.name = name
    return _check(_build(config)), yaml_messages + messages


@contextmanager
def _config_folder(recipe: str) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """The folder and name that Hydra composes from, further places to search, and messages about renamed keys."""
    if recipe in shipped_recipes():
        yield str(SHIPPED), recipe, [], []
        return
    path = Path(recipe).resolve()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UserError(
            f"There is no recipe '{recipe}'. Give the path of a YAML file or one of: {', '.join(shipped_recipes())} "
            "(lowprec recipes ls)."
        )
    _refuse_shadowing(path)
    try:
        body = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise UserError(f"{path.name} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(body, dict) or not body:
        raise UserError(f"{path.name} holds no keys. Begin it with 'defaults: [lora, _self_]' and the keys to change.")
    renamed, messages = override_rules.rename_yaml_aliases({str(key): value for key, value in body.items()}, path.name)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{path.stem}.yaml").write_text(OmegaConf.to_yaml(renamed))
        yield folder, path.stem, [f"file://{path.parent}", "pkg://lowprec_recipes"], messages


def _refuse_shadowing(path: Path) -> None:
    """A user's file with a shipped file's name would hide it, or be hidden, without a word."""
    shipped = {file.relative_to(SHIPPED).as_posix() for file in SHIPPED.rglob("*.yaml")}
    mine = [path.name, *(file.relative_to(path.parent).as_posix() for file in path.parent.glob("*/*.yaml"))]
    mine += [file.name for file in path.parent.glob("*.yaml")]
    for name in mine:
        if name in shipped or name == f"{SCHEMA_NAME}.yaml":
            raise UserError(
                f"{path.parent / name} has the name of a file that lowprec ships, so it is unclear which one is meant. "
                "Rename it."
            )


def _compose_checked(folder: str, name: str, search_path: list[str], arguments: list[str]) -> DictConfig:
    """The composed recipe. Keys that it does not have are told by what it has."""
    try:
        config = _compose(folder, name, search_path, arguments)
        if override_rules.check_keys(arguments, config) == arguments:
            return config
    except UserError:  # the recipe with the group choices alone says which key is at fault
        choices = [a for a in arguments if "." not in a.partition("=")[0]]
        config = _compose(folder, name, search_path, choices)
    return _compose(folder, name, search_path, override_rules.check_keys(arguments, config))


def _compose(folder: str, name: str, search_path: list[str], overrides: list[str]) -> DictConfig:
    search = [f"hydra.searchpath=[{','.join(search_path)}]"] if search_path else []
    try:
        with initialize_config_dir(folder, version_base="1.3"):
            return compose(name, [*overrides, *search])
    except MissingConfigException as error:
        missing = error.missing_cfg_file or "?"
        group, _, choice = str(missing).removesuffix(".yaml").rpartition("/")
        raise UserError(
            f"{name}: there is no '{choice}' for {group or 'defaults'}. Choose one of: {', '.join(_choices(group))}."
        ) from error
    except (ConfigCompositionException, OmegaConfBaseException, HydraException) as error:
        raise UserError(_explain(name, error)) from error


def _choices(group: str) -> list[str]:
    if group in override_rules.OPTION_GROUPS:
        return option_names(group)
    return sorted(file.stem for file in (SHIPPED / group).glob("*.yaml"))


def _explain(name: str, error: Exception) -> str:
    """Hydra's nested errors as one sentence with the key."""
    text = " ".join(str(error).split())
    twice = re.search(r"(\w+) appears more than once in the final defaults list", text)
    if twice:
        return f"{name}: write '- override {twice[1]}: ...' in its defaults list, to replace the choice made before it."
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    named = next((c for c in reversed(causes) if isinstance(c, OmegaConfBaseException) and c.full_key), None)
    if named is None:
        return f"{name}: {text}"
    if isinstance(named, ValidationError):
        if "is not a ListConfig" in str(named):
            return f"{named.full_key} is a list: write it in brackets, such as {named.full_key}=[one,two]; [] is none."
        return f"{named.full_key}: {str(named).splitlines()[0].rstrip('.')}."
    with initialize_config_dir(str(SHIPPED), version_base="1.3"):
        schema = compose(SCHEMA_NAME)
    return f"{name}: {override_rules.unknown_key(str(named.full_key), schema)}"


def _build(config: DictConfig) -> Recipe:
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        if "missing mandatory value" in str(error).lower():
            raise UserError(
                f"{key} is not set, and has no default: add {key}=... to the command or the recipe."
            ) from error
        raise UserError(f"{key}: {str(error).splitlines()[0]}.") from error
    assert isinstance(recipe, Recipe)
    if recipe.train.output_dir is None:
        recipe.train.output_dir = str(Path("runs", recipe.name))
    return recipe


def _check(recipe: Recipe) -> Recipe:
    """Contradictions between groups, found before any weight is loaded. Each message names the key that mends it."""
    named = {
        "model.model_name_or_path": recipe.model.model_name_or_path,
        "data.path": recipe.data.path,
        "train.output_dir": recipe.train.output_dir,
    }
    for key, value in named.items():
        if not str(value).strip():
            raise UserError(f"{key} is empty: give it a value. (A shell variable that is not set leaves it so.)")
    weights, adapter, train, data = recipe.choice("weights"), recipe.choice("adapter"), recipe.train, recipe.data
    rules = recipe.wrap.schemes(recipe.weights)
    if adapter == "none" and (weights == "nf4" or any(scheme.option_name == "nf4" for scheme in rules.values())):
        key = "weights=nf4" if weights == "nf4" else "nf4 in wrap.rules"
        raise UserError(f"{key} stores the base in 4 bits, which cannot be trained: add adapter=lora, or choose bf16.")
    if recipe.wrap.calibration_samples and not any(
        getattr(s, "chooses", False) for s in (recipe.weights, *rules.values())
    ):
        raise UserError(
            f"wrap.calibration_samples={recipe.wrap.calibration_samples} has no effect with weights={weights}, which "
            "chooses nothing by measurement: set weights=auto, or remove it."
        )
    if train.offload_embeddings and adapter == "none":
        raise UserError(
            "train.offload_embeddings=true keeps frozen embeddings on the host, and adapter=none trains them: add "
            "adapter=lora, or set it to false."
        )
    if train.torch_compile and data.packing:
        raise UserError(
            "train.torch_compile=true with data.packing=true would compile anew for every batch, since the samples' "
            "lengths differ: set one of them to false."
        )
    if data.streaming and train.max_steps is None:
        raise UserError("data.streaming=true has no known length: set train.max_steps.")
    if recipe.model.dtype == "fp16" and adapter == "none":
        raise UserError(
            "model.dtype=fp16 cannot train all weights (its gradients under- and overflow): set model.dtype=bf16, "
            "or adapter=lora, whose parameters are fp32."
        )
    if train.max_steps is not None:
        check_schedule(recipe.optimizer, train.max_steps)
    for warning_source in (recipe.optimizer, recipe.state_store):
        check = getattr(warning_source, "check", None)
        if check is not None:
            check(recipe)
    return recipe
