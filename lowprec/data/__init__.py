"""Files -> chat template -> masked, packed batches."""

import importlib
from typing import TYPE_CHECKING, Any

from lowprec.data.options import Data

if TYPE_CHECKING:
    from lowprec.data.fit import fit_to_model
    from lowprec.data.loader import EvalBatch, StepBatch, StepLoader, eval_batches
    from lowprec.data.prepare import PreparedData, Prompt, prepare_data
    from lowprec.data.summary import DataSummary

__all__ = [
    "Data",
    "DataSummary",
    "EvalBatch",
    "PreparedData",
    "Prompt",
    "StepBatch",
    "StepLoader",
    "eval_batches",
    "fit_to_model",
    "prepare_data",
]

_HOMES = {
    "fit_to_model": "fit",
    "EvalBatch": "loader",
    "StepBatch": "loader",
    "StepLoader": "loader",
    "eval_batches": "loader",
    "PreparedData": "prepare",
    "Prompt": "prepare",
    "prepare_data": "prepare",
    "DataSummary": "summary",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: a recipe's schema, and a plan, take the options alone and not what reads files.
    if name in _HOMES:
        return getattr(importlib.import_module(f"lowprec.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lowprec.data' has no attribute '{name}'")
