"""``doctor``: all checks in order."""

import warnings

from lowprec.doctor.check import Check
from lowprec.doctor.machine import check_machine
from lowprec.doctor.numerics import check_numerics
from lowprec.doctor.packages import check_packages


def doctor() -> list[Check]:
    """Try everything. Takes seconds, and no failing check stops the next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library's grumbling is no finding
        return [*check_packages(), *check_machine(), *check_numerics()]
