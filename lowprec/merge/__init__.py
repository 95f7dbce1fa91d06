"""An adapter and its base become one model in the base's own precision."""

from lowprec.merge.compare import LogitDifference
from lowprec.merge.run import MergeResult, merge

__all__ = ["LogitDifference", "MergeResult", "merge"]
