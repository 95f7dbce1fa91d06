"""lowprec: low-precision fine-tuning of language models.

``lowprec.wrap`` converts a Hugging Face model in place, ``lowprec.AdamW`` keeps optimizer states on GPU, CPU or SSD,
``lowprec.plan`` predicts what a recipe takes, ``lowprec.profile`` measures any training loop.
Importing this package touches neither CUDA nor Triton.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["AdamW", "WrapReport", "plan", "profile", "wrap"]

_HOMES = {
    "wrap": "lowprec.prepare",
    "WrapReport": "lowprec.prepare",
    "AdamW": "lowprec.optim",
    "profile": "lowprec.profiling.session",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that ``lowprec --help`` does not wait for PyTorch.
    if name == "plan":
        return importlib.import_module("lowprec.plan")  # which can be called
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lowprec' has no attribute '{name}'")
