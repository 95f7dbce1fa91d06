"""What this machine can run: every claim is tried, and every 'no' has a reason and a remedy."""

from lowprec.doctor.check import Check, exit_code, render, to_json
from lowprec.doctor.measured import measure_machine
from lowprec.doctor.run import doctor

__all__ = ["Check", "doctor", "exit_code", "measure_machine", "render", "to_json"]
