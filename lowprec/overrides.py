"""``key=value`` on the command line and keys in a user's recipe: aliases, unknown keys, and the nearest valid one.

Hydra accepts ``+key=value`` for keys that nothing reads and swallows anything under ``hydra.``; both hide typing
mistakes, so every key is held against the composed recipe's schema before anything is merged.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lowprec.errors import UserError
from lowprec.option import option_names

ALIASES = {
    "base_model": "model.model_name_or_path",
    "micro_batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lr": "optimizer.learning_rate",
}
"""Names that axolotl, LLaMA-Factory, unsloth and torchtune use, and what they are called here."""

OPTION_GROUPS = ("weights", "adapter", "optimizer", "state_store")
"""Groups whose choice is a dataclass of its own, with keys of its own."""


def parse_overrides(arguments: Iterable[str]) -> list[Override]:
    """Parse ``key=value`` arguments by Hydra's grammar.

    Raises:
        UserError: an argument is no ``key=value``, deletes a key, or sets a key of Hydra itself.
    """
    parsed = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise UserError(
                f"'{argument}' is not of the form key=value ({str(error).splitlines()[0]}). Quote values that hold "
                "spaces, commas or brackets, for example 'data.path=\"my file.jsonl\"'."
            ) from error
        key = override.key_or_group
        if override.is_delete():
            raise UserError(f"'{argument}' would delete a key. Set {key} to another value, null, or another choice.")
        if key == "hydra" or key.startswith("hydra."):
            raise UserError(f"'{argument}' sets Hydra itself, which lowprec does not read. Remove it.")
        parsed.append(override)
    return parsed


def canonical_key(key: str) -> str | None:
    """The canonical name of an alias (``lr``, ``optimizer.lr``), or None where ``key`` is no alias."""
    group, _, leaf = key.rpartition(".")
    name = ALIASES.get(leaf)
    return name if name is not None and group in ("", name.partition(".")[0]) else None


def rename_aliases(overrides: list[Override]) -> tuple[list[str], list[str]]:
    """Give every alias its canonical name.

    Returns:
        The overrides as strings that Hydra reads, without ``+``; and a message for each alias.

    Raises:
        UserError: two spellings of one key have different values.
    """
    values: dict[str, tuple[str, str]] = {}  # canonical key -> (as written, its value)
    messages = []
    for override in overrides:
        written = override.key_or_group
        key = canonical_key(written) or written
        value = override.get_value_string()
        if key in values and values[key][1] != value and values[key][0] != written:
            raise UserError(
                f"{values[key][0]}={values[key][1]} and {written}={value} set the same key, {key}, to different "
                f"values. Keep one of them."
            )
        if key != written:
            messages.append(f"{written} is called {key} here.")
        values[key] = (written, value)
    return [f"{key}={value}" for key, (_, value) in values.items()], messages


def rename_yaml_aliases(node: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The same for the body of a recipe file: a nested mapping with aliases renamed, and a message for each.

    Raises:
        UserError: an alias stands beside its key with a different value.
    """
    renamed: dict[str, Any] = {}
    messages: list[str] = []
    aliases: list[tuple[str, str, Any]] = []
    for top, value in node.items():
        if canonical_key(str(top)):
            aliases.append((str(top), str(canonical_key(str(top))), value))
        elif isinstance(value, Mapping):
            inner = {}
            for leaf, leaf_value in value.items():
                canonical = canonical_key(f"{top}.{leaf}")
                if canonical:
                    aliases.append((f"{top}.{leaf}", canonical, leaf_value))
                else:
                    inner[leaf] = leaf_value
            renamed[str(top)] = inner
        else:
            renamed[str(top)] = value
    for written, canonical, value in aliases:
        group, _, leaf = canonical.partition(".")
        section = renamed.setdefault(group, {})
        if section.setdefault(leaf, value) != value:
            raise UserError(
                f"{source}: {written}: {value} and {canonical}: {section[leaf]} set the same key to different values. "
                f"Keep {canonical}."
            )
        messages.append(f"{source}: {written} is called {canonical} here.")
    return renamed, messages


def schema_keys(config: DictConfig) -> list[str]:
    """Every dotted key of a composed recipe, groups included: ``train``, ``train.max_steps``, ..."""
    return [key for key, _ in _typed_keys(config, "")]


def _typed_keys(node: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every dotted key below a node, and the type of its value."""
    for name in map(str, node):
        kind = OmegaConf.get_type(node, name)
        yield prefix + name, kind
        if is_dataclass(kind):
            yield from _typed_keys(node[name], f"{prefix}{name}.")


def _option_keys(group: str, name: str) -> list[str]:
    chosen = OmegaConf.get_type(ConfigStore.instance().load(f"{group}/{name}.yaml").node)
    assert is_dataclass(chosen)
    return [field.name for field in fields(chosen)]


def check_keys(overrides: list[str], config: DictConfig) -> list[str]:
    """Refuse keys that the recipe does not have, naming the nearest that it has.

    Args:
        overrides: ``key=value`` with canonical names.
        config: the recipe composed with the group choices alone.

    Returns:
        The overrides as Hydra reads them: what is below a field of type dict is free
        (``optimizer.lr_scheduler_kwargs.num_cycles=2``, ``optimizer.lr_scheduler_kwargs={num_cycles:2}``), and Hydra
        wants to be told that it is new.
    """
    kinds = dict(_typed_keys(config, ""))
    checked = []
    for override in overrides:
        key = override.partition("=")[0]
        parts = key.split(".")
        free = any(kinds.get(".".join(parts[:length])) is dict for length in range(1, len(parts) + 1))
        if key not in kinds and not free:
            raise UserError(unknown_key(key, config))
        checked.append(f"++{override}" if free else override)
    return checked


def unknown_key(key: str, config: DictConfig) -> str:
    """What to say of a key that the recipe does not have."""
    known = schema_keys(config)
    group, _, leaf = key.rpartition(".")
    canonical = canonical_key(key)
    if canonical:
        return f"{key} is called {canonical} here."
    if group in OPTION_GROUPS and group in config:
        chosen = getattr(OmegaConf.get_type(config, group), "option_name", "?")
        mine = [k.partition(".")[2] for k in known if k.startswith(f"{group}.")]
        near = difflib.get_close_matches(leaf, mine, n=1, cutoff=0.5)
        others = [name for name in option_names(group) if leaf in _option_keys(group, name)]
        if near:
            hint = f"Did you mean {group}.{near[0]}?"
        elif others:
            hint = f"{group}={' and '.join(others)} has it: set that, or remove the key."
        else:
            hint = f"It has: {', '.join(mine)}." if mine else "It has no keys."
        return (
            f"Unknown key {key}: {group}={chosen} has no key '{leaf}'. {hint} The choices of {group} are "
            f"{', '.join(option_names(group))}."
        )
    same_leaf = [k for k in known if "." in k and k.rpartition(".")[2] == leaf]
    near = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        leaves = {k.rpartition(".")[2]: k for k in known}
        near = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1)]
    hint = f"Did you mean {near[0]}?" if near else f"The groups are {', '.join(str(g) for g in config)}."
    return f"Unknown key {key}. {hint}"
