"""Files -> chat template -> masked, packed batches."""

from lowprec.data.fit import fit_to_model
from lowprec.data.loader import EvalBatch, StepBatch, StepLoader, eval_batches
from lowprec.data.options import Data
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
