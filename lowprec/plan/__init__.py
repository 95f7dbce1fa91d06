"""What a recipe takes before it runs: memory by part, time, disk, and what fits. How it is found: docs/plan.md.

The package can be called: ``lowprec.plan("lora", ["model.model_name_or_path=..."], vram="8GiB")`` is
``lowprec.plan.run.plan(...)``.
"""

import sys
from types import ModuleType
from typing import Any

from lowprec.plan.predict import Planner, Prediction, model_config
from lowprec.plan.report import Plan
from lowprec.plan.run import plan

__all__ = ["Plan", "Planner", "Prediction", "model_config", "plan"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
