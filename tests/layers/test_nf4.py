import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lowprec.errors import UserError
from lowprec.layers.nf4 import NF4
from lowprec.plan.schemes import NF4WithoutData
from lowprec.testing import sqnr_db

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(n_in=128, n_out=96, bias=True, dtype=torch.bfloat16, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n_in, n_out, bias=bias).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 96), (64, 64), (192, 576), (48, 80), (8, 6)])
def test_the_weight_is_really_packed_and_close(dtype, shape):
    plain = linear(*shape, dtype=dtype)
    reference = plain.weight.detach().clone()
    layer = NF4().convert(plain, frozen=True)
    assert isinstance(layer, nn.Linear) and isinstance(layer, bnb.nn.Linear4bit)
    assert (layer.in_features, layer.out_features) == shape and layer.bias is plain.bias
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == -(-shape[0] * shape[1] // 2)
    assert not layer.weight.requires_grad
    decoded = layer.dequantized_weight()
    assert decoded.dtype == dtype and decoded.shape == reference.shape
    # 16 levels for a uniform distribution: a step of about 1/8 of the block's maximum, 20 dB and a little more
    assert sqnr_db(reference, decoded) > 18


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_weight_is_the_nearest_of_16_levels(double_quant):
    """Against the format written out in fp64: block maxima, and the nearest of the code's levels."""
    plain = linear(256, 64, dtype=torch.float32)
    layer = NF4(double_quant=double_quant).convert(copy.deepcopy(plain), frozen=True)
    levels = layer.weight.quant_state.code.double()
    blocks = plain.weight.detach().double().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = levels[(blocks / scale)[..., None].sub(levels).abs().argmin(-1)] * scale
    if double_quant:
        assert sqnr_db(nearest, layer.dequantized_weight().reshape(-1, 64)) > 38  # the scales in 8 bits
    else:
        torch.testing.assert_close(layer.dequantized_weight().double().reshape(-1, 64), nearest, rtol=1e-6, atol=1e-7)


def stored_bits(layer: nn.Module) -> float:
    state = layer.state_dict()
    tensors = [state["weight"], state["weight.absmax"], *(v for k, v in state.items() if "nested_absmax" in k)]
    return 8 * sum(t.numel() * t.element_size() for t in tensors) / (layer.in_features * layer.out_features)


def test_double_quantisation_saves_the_bits_it_says():
    def convert(**options):
        return NF4(**options).convert(linear(1024, 512, bias=False), frozen=True)

    assert stored_bits(convert(double_quant=False)) == pytest.approx(4.5, abs=1e-3)
    assert stored_bits(convert()) == pytest.approx(4.127, abs=1e-3)
    assert stored_bits(convert(block_size=256)) == pytest.approx(4 + 8 / 256 + 32 / 65536, abs=1e-3)
    with pytest.raises(UserError, match="weights.block_size=48"):
        NF4(block_size=48)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_products_equal_those_of_the_decoded_weight(bias, training):
    layer = NF4().convert(linear(bias=bias), frozen=True).train(training)
    weight = layer.dequantized_weight().double()
    x = torch.randn(2, 5, 128, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected = x.detach().double() @ weight.T + (layer.bias.detach().double() if bias else 0)
    assert y.dtype == torch.bfloat16 and sqnr_db(expected, y) > 45
    assert sqnr_db(grad.double() @ weight, x.grad) > 45
    if bias:
        assert sqnr_db(grad.double().sum((0, 1)), layer.bias.grad) > 40


def test_training_after_an_evaluation_still_passes_gradients():
    layer = NF4().convert(linear(), frozen=True)
    packed = layer.weight.data.clone()
    with torch.no_grad():
        before = layer.eval()(torch.ones(1, 4, 128, dtype=torch.bfloat16))
    x = torch.ones(1, 4, 128, dtype=torch.bfloat16, requires_grad=True)
    after = layer.train()(x)
    after.sum().backward()
    assert torch.equal(before, after) and x.grad.abs().sum() > 0 and torch.equal(packed, layer.weight.data)


def test_a_trained_fp32_bias_stays_fp32():
    layer = NF4().convert(linear(), frozen=True)
    layer.bias.data = layer.bias.data.float()
    layer(torch.ones(3, 128, dtype=torch.bfloat16)).sum().backward()
    assert layer.bias.dtype == layer.bias.grad.dtype == torch.float32


def test_what_is_left_alone_says_why():
    scheme = NF4()
    plain = linear()
    assert scheme.why_not(plain, frozen=True) is None
    assert "trained" in scheme.why_not(plain, frozen=False)
    assert "already 4-bit" in scheme.why_not(scheme.convert(plain, frozen=True), frozen=True)
    assert "float64" in scheme.why_not(linear(dtype=torch.float64), frozen=True)


def test_a_copy_and_a_saved_state_hold_the_same_weight():
    layer = NF4().convert(linear(), frozen=True)
    assert torch.equal(copy.deepcopy(layer).dequantized_weight(), layer.dequantized_weight())
    state = {k.removeprefix("weight."): v for k, v in layer.state_dict().items() if k.startswith("weight.")}
    again = bnb.nn.Params4bit.from_prequantized(layer.state_dict()["weight"], state, device="cpu")
    decoded = bnb.functional.dequantize_4bit(again.data, again.quant_state)
    assert torch.equal(decoded, layer.dequantized_weight())


@pytest.mark.gpu
def test_the_same_on_cuda():
    cpu = NF4().convert(linear(1024, 512), frozen=True)
    layer = NF4().convert(linear(1024, 512).cuda(), frozen=True)
    assert layer.weight.device.type == "cuda" and layer.weight.dtype == torch.uint8
    assert sqnr_db(cpu.dequantized_weight(), layer.dequantized_weight()) > 30
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    weight = layer.dequantized_weight().double()
    assert sqnr_db(x.detach().double() @ weight.T + layer.bias.detach().double(), y) > 45
    assert sqnr_db(torch.ones_like(y).double() @ weight, x.grad) > 45


@pytest.mark.parametrize("shape", [(4096, 1024), (14336, 4096), (64, 64)])
@pytest.mark.parametrize("product", ["int8", "fp8", "bf16"])
def test_a_plan_traces_the_product_that_training_runs(product, shape):
    """Both ask the scheme, whose rotation is the widest that divides the layer."""
    plan = NF4(product=product).product_plan(*shape)
    assert plan == NF4WithoutData(product=product).product_plan(*shape)
    assert (plan is None) == (product == "bf16")
