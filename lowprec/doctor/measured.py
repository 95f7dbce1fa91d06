"""``doctor --measure``: measure with a bar, write the profile, show what was found."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lowprec.errors import UserError
from lowprec.machine.measure import measure
from lowprec.machine.profile import Profile, profile_path


def measure_machine(folder: str, console: Console, as_json: bool) -> None:
    """Write this machine's profile and print it, as a table or as the JSON that was written.

    Args:
        folder: on the disk to measure.

    Raises:
        UserError: the folder is not there, has no room, or is held by a run.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--path {folder} is not a folder: give one on the disk whose speed plans should count with.")
    columns = (TextColumn("measuring"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        profile = measure(Path(folder), lambda what, share: bar.update(task, completed=share, description=what))
        if torch.cuda.is_available():
            from lowprec.bench.train.host import host_times  # transformers and all: the doctor is to start fast

            bar.update(task, completed=0.97, description="the host")
            host: dict[str, Any] = host_times(torch.device("cuda"))
            profile = replace(profile, machine=replace(profile.machine, **host))
    profile.write(profile_path())
    if as_json:
        print(json.dumps(profile.to_dict(), indent=1))
    else:
        render_profile(profile, console)
        console.print(f"Written to {profile_path()}.", soft_wrap=True, highlight=False)


def render_profile(profile: Profile, console: Console) -> None:
    """Two tables: rates, and how well products that were not measured are predicted."""
    machine, limits = profile.machine, profile.limits
    rates = Table(title=machine.name, title_justify="left", show_header=False, box=None)
    rates.add_row("memory, read and written", f"{machine.memory_gb_per_s:.3g} GB/s")
    if machine.capability is not None:
        sure = " (assumed: others change the card's memory)" if "context_mib" in machine.assumed else ""
        text = f"{machine.vram_gib:.1f} GiB, {machine.context_mib:.0f} MiB of context{sure}"
        rates.add_row("memory of the card", text)
        rates.add_row("to the card, from it", f"{machine.h2d_gb_per_s:.3g}, {machine.d2h_gb_per_s:.3g} GB/s")
        rates.add_row("host memory pinned at once", f"{limits['pinned_gib']:g} GiB at least")
        rates.add_row("power limit", f"{machine.power_w:.0f} W" if machine.power_w else "hidden by the driver")
    way = "O_DIRECT" if limits["disk_direct"] else "through the page cache"
    disk = (
        f"{machine.disk_read_gb_per_s:.3g}, {machine.disk_write_gb_per_s:.3g}, {machine.disk_mixed_gb_per_s:.3g} GB/s"
    )
    rates.add_row("disk, read, write, both at once", f"{disk} ({way}, {limits['disk_path']})")
    rates.add_row("least time of a kernel, of a product", f"{machine.launch_us:.3g}, {machine.product_us:.3g} us")
    if machine.capability is not None:
        own = "" if machine.own_host_us is None else f", for one of lowprec's {machine.own_host_us:.3g} us"
        rates.add_row("the host, for an operator of a step", f"{machine.host_us:.3g} us{own}")
        if machine.replay_us is not None:
            rates.add_row("the host, for a pass of a replayed layer", f"{machine.replay_us:.3g} us")
    console.print(rates, highlight=False)
    products = Table(title="\nProducts, and predictions of layers that were held out", title_justify="left", box=None)
    for column in ("kind", "TFLOP/s", "timed", "median error", "90 % within", "median error of the bound alone"):
        products.add_column(column, justify="left" if column == "kind" else "right")
    for kind, found in profile.validation.items():
        errors = (found.median_error, found.p90_error, found.median_error_of_bound)
        shown = (f"{100 * error:.1f} %" for error in errors)
        products.add_row(kind, f"{machine.tflops[kind]:.3g}", str(found.products), *shown)
    console.print(products, highlight=False)
    for kind, reason in limits["kinds_refused"].items():
        console.print(f" {kind:<5} not timed: {reason}", highlight=False, markup=False)
    repeat = f"The same product, timed twice, differs by {100 * profile.repeat_error:.1f} % (median)."
    console.print(repeat, highlight=False)
    if profile.repeat_error > BUSY:
        console.print("[yellow]Something else is running here:[/] measure again when it is quiet.", highlight=False)


BUSY = 0.1
"""A difference between two times that says more of other work than of the machine."""
