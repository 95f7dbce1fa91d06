"""The benchmark of a step's pieces."""

import pytest
import torch

from lowprec.bench import step
from lowprec.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only without a GPU")
def test_needs_a_gpu():
    with pytest.raises(UserError, match="no CUDA device"):
        step.run()


@pytest.mark.gpu
def test_every_way_is_measured():
    result = step.run(heads=((256, 64, 1024, True),), widths=((256, 512, 1024, 8, 2),))
    ways = {(row["piece"], row["way"].split(" of ")[0]) for row in result.rows}
    assert {("head and loss", "Liger"), ("head and loss", "chunks"), ("RoPE", "Liger"), ("SwiGLU", "Liger")} <= ways
    assert all(row["ms"] > 0 for row in result.rows)
