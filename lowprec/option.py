"""``@option(group, name)``: the one registry, Hydra's ConfigStore, and nothing beside it.

An option is a dataclass that declares its fields (with their defaults) and builds the object it stands for.
``weights=nf4`` on the command line composes the dataclass registered as ``option("weights", "nf4")``.
"""

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import TypeVar

from hydra.core.config_store import ConfigStore

T = TypeVar("T")


def option(group: str, name: str) -> Callable[[type[T]], type[T]]:
    """Register a dataclass as the choice ``name`` of the recipe group ``group``.

    The class gets ``option_name = name``, which reports print.
    """

    def register(cls: type[T]) -> type[T]:
        assert is_dataclass(cls), f"{cls.__name__} must be a dataclass: decorate it with @dataclass below @option"
        cls.option_name = name  # type: ignore[attr-defined]  # set here so that the name is written once
        ConfigStore.instance().store(group=group, name=name, node=cls, provider="lowprec")
        return cls

    return register


def option_names(group: str) -> list[str]:
    """The registered choices of a group, sorted."""
    return sorted(entry.removesuffix(".yaml") for entry in ConfigStore.instance().list(group))
