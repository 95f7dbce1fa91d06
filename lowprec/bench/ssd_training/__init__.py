"""``lowprec bench ssd --works``: full fine-tuning over a state store beside the raw disk and DeepSpeed, on one disk."""

from lowprec.bench.ssd_training.run import bench_ssd_training

__all__ = ["bench_ssd_training"]
