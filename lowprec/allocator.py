"""How PyTorch hands out device memory: settings that have to be made before CUDA starts."""

import os

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""PyTorch's variable, and its older name, which still counts."""


def use_expandable_segments() -> None:
    """Let segments of device memory grow: without it, lengths that change from batch to batch fragment the memory.

    What the user has set in either variable stays. Once CUDA has started it changes nothing.
    """
    if not any(name in os.environ for name in NAMES):
        os.environ[NAMES[0]] = "expandable_segments:True"
