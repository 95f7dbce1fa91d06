"""What a store on a disk has moved, how long training waited for it, and what that wears off the drive."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Traffic:
    """Counters since the store was opened."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_s: float = 0.0
    """Time in reads, summed over threads."""
    write_s: float = 0.0
    """Time in writes, summed over threads."""
    unhidden_s: float = 0.0
    """Time that training stood still for a read, a buffer or a flush."""


def drive_facts(traffic: Traffic | None, steps: int, num_steps: int | None, drive_tbw: float | None) -> dict[str, Any]:
    """The report's figures of a disk: GB moved, seconds not hidden, the share of an endurance of ``drive_tbw`` TB."""
    if traffic is None:
        return {}
    written_tb = traffic.bytes_written / 1e12
    facts: dict[str, Any] = {
        "read_gb": traffic.bytes_read / 1e9,
        "written_gb": traffic.bytes_written / 1e9,
        "unhidden_s": traffic.unhidden_s,
    }
    projected_tb = written_tb / steps * num_steps if steps and num_steps else None
    if projected_tb is not None:
        facts["projected_written_gb"] = projected_tb * 1e3
    if drive_tbw is not None:
        facts["drive_share"] = written_tb / drive_tbw
        if projected_tb is not None:
            facts["projected_drive_share"] = projected_tb / drive_tbw
    return facts
