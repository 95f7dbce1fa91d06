"""``lowprec bench step``: the pieces of a training step beside what they replace, each by itself, on a GPU."""

from lowprec.bench.step.run import bench_step

__all__ = ["bench_step"]
