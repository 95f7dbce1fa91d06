"""8-bit layers under FSDP2, which gathers weights at the same address without moving their version counter."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lowprec.layers.eight_bit_schemes import Fp8, Int8Hadamard
from lowprec.prepare import wrap
from lowprec.testing import tiny_model


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("fsdp") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(scheme, frozen: bool, policy: MixedPrecisionPolicy | None) -> list[float]:
    """Of four steps, and once more after the weights were put back without an optimizer's step."""
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(model, scheme, frozen=frozen)
    if policy is not None:
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    trained = [p for p in model.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    with torch.no_grad():
        model(input_ids=ids)
        if policy is not None:
            model.reshard()  # the root keeps its gathered copies
        for parameter, value in zip(trained, first, strict=True):
            parameter.copy_(value)
    return [*found, model(input_ids=ids, labels=ids).loss.item()]


@pytest.mark.filterwarnings("ignore:weights.cache has no effect")
@pytest.mark.parametrize("scheme", [Fp8(), Fp8(cache="both"), Int8Hadamard(cache="one")], ids=str)
def test_trained_weights(scheme):
    expected = losses(scheme, False, None)
    assert losses(scheme, False, MixedPrecisionPolicy()) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] == pytest.approx(expected[0], abs=1e-5) and expected[3] < expected[0] - 0.5
    half = losses(scheme, False, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert half == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("scheme", [Fp8(), Int8Hadamard(layout="both")], ids=str)
def test_a_frozen_base(scheme):
    expected = losses(scheme, True, None)
    assert losses(scheme, True, MixedPrecisionPolicy()) == pytest.approx(expected, abs=1e-5)
    assert losses(scheme, True, MixedPrecisionPolicy(param_dtype=torch.bfloat16)) == pytest.approx(expected, abs=0.05)
