"""Sizes for tests and benchmarks of the norm of a gradient, which is read once."""

import torch

NUMELS = (1, 7, 2048, 4096, 4097, 12_345)
LARGE = (2048, 2048 * 512, 2048 * 8192, 128_256 * 2048)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
