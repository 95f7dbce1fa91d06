"""``doctor``: all checks in order."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lowprec.doctor.check import Check
from lowprec.doctor.disk import check_disk
from lowprec.doctor.gpu import check_gpus
from lowprec.doctor.kernels import check_kernels
from lowprec.doctor.libraries import check_libraries
from lowprec.doctor.numerics import check_numerics
from lowprec.doctor.packages import check_packages
from lowprec.doctor.recipes import check_recipes
from lowprec.doctor.system import check_system


def doctor(quick: bool = False, progress: Callable[[str], None] = lambda name: None) -> list[Check]:
    """Try everything; no failing check stops the next.

    Args:
        quick: leave out what takes seconds: torch.compile and the disk's speed.
        progress: called with the name of each check that is done.
    """
    checks = []
    with _silence():
        for check in _checks(quick):
            checks.append(check)
            progress(check.name)
    return checks


@contextmanager
def _silence() -> Iterator[None]:
    """A library's grumbling is no finding."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _checks(quick: bool) -> Iterator[Check]:
    yield from check_packages()
    yield from check_system()
    yield from check_gpus()
    yield from check_disk(quick)
    yield from check_numerics()
    yield from check_kernels()
    yield from check_libraries(quick)
    yield from check_recipes()
