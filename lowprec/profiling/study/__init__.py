"""``lowprec profile --study consumer_gpu``: the study of arXiv:2509.12229 with one factor changed at a time."""

from lowprec.profiling.study.run import run_study

__all__ = ["run_study"]
