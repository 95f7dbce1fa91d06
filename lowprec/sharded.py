"""Tensors that FSDP2 has sharded over processes."""

import sys
from typing import Any


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``. Whoever has made one has imported its module, which takes half a second (and
    SymPy) and which a single process does without."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
