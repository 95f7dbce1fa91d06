"""What a recipe takes before it runs: memory by part, time, disk, and what fits. ``docs/plan.md`` says how it is found."""

from lowprec.plan.predict import Planner, Prediction, model_config
from lowprec.plan.report import Plan
from lowprec.plan.run import fitting_policy, plan

__all__ = ["Plan", "Planner", "Prediction", "fitting_policy", "model_config", "plan"]
