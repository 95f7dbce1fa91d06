"""``lowprec bench train``: whole training steps beside other libraries', each run in a process of its own."""

from lowprec.bench.train.run import bench_train

__all__ = ["bench_train"]
