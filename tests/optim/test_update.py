"""Which slices the kernel takes together."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel's module is imported

from lowprec.optim.format import StateFormat
from lowprec.optim.layout import initialise, make_layout
from lowprec.optim.steps import StepCounts
from lowprec.optim.update import FEWEST_TOGETHER, Slice, _in_tables, _update_decoded, _update_on_gpu

CPU = torch.device("cpu")


def make(numels, dtypes):
    """(slice, gradient) of each parameter, in a step that has begun."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).to(dtype) for n, dtype in zip(numels, dtypes, strict=True)]
    grads = [torch.randn(n, generator=generator).to(dtype) for n, dtype in zip(numels, dtypes, strict=True)]
    formats = {i: StateFormat.of("p", param, "int8", "none", False) for i, param in enumerate(params)}
    counts = StepCounts(dict.fromkeys(formats, CPU), [0] * len(params))
    group = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False}
    counts.begin([group])
    pairs = []
    for chunk in make_layout(dict(enumerate(numels)), formats, None):
        buffer = torch.empty(chunk.nbytes, dtype=torch.uint8)
        initialise(chunk, buffer, params)
        i = chunk.pieces[0].parameter
        pairs.append((Slice.of(params[i], chunk.pieces[0], chunk.views(buffer)[0], counts.steps(i), key=i), grads[i]))
    return sorted(pairs, key=lambda pair: pair[0].piece.parameter)


def numbers(pairs):
    return [part.piece.parameter for part, _ in pairs]


def test_small_slices_of_one_format_go_together():
    pytest.importorskip("triton")
    bf16, fp32 = torch.bfloat16, torch.float32
    pairs = make([256, 64, 37, 48, 512, 64, 64], [bf16, bf16, bf16, bf16, bf16, fp32, fp32])
    alone, tables = _in_tables(pairs)
    assert numbers(alone) == [2, 5, 6] and [numbers(table) for table in tables] == [[0, 1, 3, 4]]
    shifted = [(part, torch.empty(grad.numel() + 1, dtype=grad.dtype)[1:]) for part, grad in pairs]
    alone, tables = _in_tables(shifted)
    assert not tables and sorted(numbers(alone)) == list(range(7)), "gradients that cannot be read 16 bytes at a time"


def test_a_table_and_single_launches_update_like_the_definition(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    sizes = [256, 64, 37, 48, 512]
    assert len(sizes) > FEWEST_TOGETHER
    ours, expected = (make(sizes, [torch.bfloat16] * 5) for _ in range(2))
    before = [part.param.clone() for part, _ in ours]
    _update_on_gpu(ours, ours[0][0].steps, None)
    for part, grad in expected:
        _update_decoded(part, grad, 0, grad.numel(), None)
    for (part, _), (other, _), old in zip(ours, expected, before, strict=True):
        assert (part.param != old).float().mean() > 0.5
        assert (part.param != other.param).float().mean() <= 0.02, "rounded otherwise than by chance"
        apart = (part.states["exp_avg"].int() - other.states["exp_avg"].int()).abs()
        assert apart.max() <= 1 and apart.float().mean() < 0.02
