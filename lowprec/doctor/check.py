"""The result of one check, and how results are shown."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim about this machine."""

    group: str
    name: str
    ok: bool | None
    """None for plain information, which is neither good nor bad."""
    found: str = ""
    """What was found or measured."""
    reason: str = ""
    """Why not; set wherever ``ok`` is False."""
    remedy: str = ""
    """What would change that; set wherever ``ok`` is False."""
    required: bool = False
    """Whether the shipped recipes need it."""

    def __post_init__(self) -> None:
        assert self.ok is not False or (self.reason and self.remedy), f"{self.name}: a 'no' needs a reason and a remedy"


def attempt(group: str, name: str, try_it: Callable[[], str], *, remedy: str, required: bool = False) -> Check:
    """Run ``try_it``, which returns what it found; whatever it raises becomes the reason of a 'no'."""
    try:
        found = try_it()
    except Exception as error:  # a broken driver or library can raise anything, and no check may stop the others
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return Check(group=group, name=name, ok=False, reason=reason, remedy=remedy, required=required)
    return Check(group=group, name=name, ok=True, found=found, required=required)


def exit_code(checks: Iterable[Check]) -> int:
    """0 where everything that the shipped recipes need is there, else 1."""
    return int(any(check.required and check.ok is False for check in checks))


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """``{"can_run_default_recipes": bool, "checks": [...]}``."""
    return {"can_run_default_recipes": exit_code(checks) == 0, "checks": [asdict(check) for check in checks]}


def render(checks: Sequence[Check], console: Console) -> None:
    """Print a table by group, each 'no' with its reason and remedy, and the verdict below."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            table.add_row("", Text(group, style="bold"), "")
        sign, style = {True: ("yes", "green"), None: ("", ""), False: ("NO", "bold red")}[check.ok]
        if check.ok is False and not check.required:
            sign, style = "no", "yellow"
        text = check.found if check.ok is not False else f"{check.reason}. {check.remedy}"
        table.add_row(Text(sign, style=style), Text(check.name), Text(text))
    console.print(table)
    missing = [check.name for check in checks if check.required and check.ok is False]
    if missing:
        console.print(f"\nThe shipped recipes cannot all run here: {', '.join(missing)}.", highlight=False)
    else:
        console.print("\nThe shipped recipes can run here.", highlight=False)
