"""Tensors without data: what is remembered of a call is what PyTorch's own mode makes of it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowprec.plan.without_data import no_data

CALLS = {
    "new": lambda a: a * 2,
    "view": lambda a: a[1:, ::2].T,
    "another dtype": lambda a: a.view(torch.int32),
    "in place": lambda a: a.add_(1),
    "out": lambda a: torch.mul(a, 2, out=torch.empty_like(a)),
    "several": lambda a: a.max(0),
    "a list of views": lambda a: a.split(2),
    "numbers": lambda a: torch.ops.aten._scaled_dot_product_flash_attention(*3 * [a.bfloat16()[None, None]]),
    "nothing": lambda a: torch._foreach_copy_([a], [a]),
    "a number's type": lambda a: torch.ones(3, dtype=torch.int64) * 2,
    "another number's type": lambda a: torch.ones(3, dtype=torch.int64) * 2.0,
    "default dtype": lambda a: torch.empty(3),
}


def seen(mode, call):
    """Form and aliases of the results of a call that is made twice."""
    with mode:
        a = torch.empty(6, 4)
        for _ in range(2):
            out = call(a)
        results = list(out) if isinstance(out, list | tuple) else [out]
        return [
            (r.shape, r.stride(), r.storage_offset(), r.dtype, r.device, r is a,
             r.untyped_storage()._cdata == a.untyped_storage()._cdata, r.untyped_storage().nbytes())
            if isinstance(r, torch.Tensor) else r
            for r in results
        ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_remembered_result_is_the_result(name, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert seen(no_data(), CALLS[name]) == seen(FakeTensorMode(), CALLS[name])
    finally:
        torch.set_default_dtype(before)
