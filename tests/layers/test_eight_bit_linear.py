"""The layers around the products: cached codes, state dicts, what a frozen weight shows and refuses."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lowprec.errors import UserError
from lowprec.layers import eight_bit_linear
from lowprec.layers.eight_bit import frozen_transposed_weight
from lowprec.layers.eight_bit_linear import FrozenEightBitLinear
from lowprec.layers.eight_bit_schemes import Fp8, Fp8Hadamard, Int8Hadamard
from lowprec.layers.products import Product, WeightGradient
from lowprec.prepare import wrap
from lowprec.testing import sqnr_db, tiny_model

SCHEMES = (Fp8, Fp8Hadamard, Int8Hadamard)


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(64, 32).bfloat16()


@pytest.fixture
def casts(monkeypatch) -> list:
    """One entry for each time that a weight was quantised."""
    made = []
    plain = eight_bit_linear.weight_codes
    monkeypatch.setattr(eight_bit_linear, "weight_codes", lambda *args: made.append(1) or plain(*args))
    return made


def edit_in_place(layer, optimizer):
    with torch.no_grad():
        layer.weight.mul_(-1)


def edit_load(layer, optimizer):
    layer.load_state_dict(linear(seed=5).state_dict())


def edit_data(layer, optimizer):
    layer.weight.data = linear(seed=6).weight.data


def edit_through_data(layer, optimizer):
    layer.weight.data.mul_(-1)
    layer.forget_codes()


def edit_by_optimizer(layer, optimizer):
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()


class WritesThroughData(torch.optim.Optimizer):
    """As bitsandbytes' optimizers and fused kernels do: the version counter does not move."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        self.param_groups[0]["params"][0].data.mul_(-1)


def edit_by_optimizer_through_data(layer, optimizer):
    version = layer.weight._version
    WritesThroughData(layer.parameters()).step()
    assert layer.weight._version == version


def edit_data_twice(layer, optimizer):
    """The second copy may lie where the weight was: neither address nor version tells."""
    layer.weight.data = layer.weight.data * -1
    layer.weight.data = layer.weight.data * 2


EDITS = (
    edit_in_place, edit_load, edit_data, edit_data_twice, edit_through_data, edit_by_optimizer,
    edit_by_optimizer_through_data,
)  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cache", ["one", "both"])
@pytest.mark.parametrize("edit", EDITS)
def test_cached_codes_follow_the_weight(scheme, cache, edit, casts):
    layer = scheme(cache=cache).convert(linear(), False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5)
    x = torch.randn(16, 64).bfloat16()
    for _ in range(3):
        layer(x).sum().backward()
    assert len(casts) == 1
    layer.zero_grad()
    edit(layer, optimizer)
    plain = linear()
    plain.weight, plain.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias
    fresh = scheme().convert(plain, False)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(a), fresh(b)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(y, expected) and torch.equal(a.grad, b.grad)


def test_without_a_cache_each_call_quantises(casts):
    layer = Fp8().convert(linear(), False)
    for _ in range(3):
        layer(torch.randn(16, 64).bfloat16())
    assert len(casts) == 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_evaluation_takes_the_weight_that_is_saved(scheme, dtype, casts):
    plain = linear().to(dtype)
    layer, x = scheme().convert(copy.deepcopy(plain), False), torch.randn(16, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(layer.eval()(x), plain(x))
        assert not casts
        assert not torch.equal(layer.train()(x), plain(x))  # reentrant checkpointing's first pass, which trains
    with torch.no_grad():
        assert layer.eval()(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), plain.bfloat16()(x))  # with gradients: a loop that never called train()
    assert len(casts) == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_trained_layer_saves_its_parameters_bit_for_bit(scheme):
    plain = linear()
    layer = scheme(cache="both").convert(copy.deepcopy(plain), False)
    layer(torch.randn(4, 64).bfloat16())
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"] and layer.weight.is_leaf and isinstance(layer, nn.Linear)
    assert all(torch.equal(state[key], plain.state_dict()[key]) for key in state)
    assert layer.dequantized_weight() is layer.weight


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_keeps_codes_of_its_own_weight(twin_of, casts):
    layer = Fp8(cache="one").convert(linear(), False)
    x = torch.randn(4, 64).bfloat16()
    layer(x)
    twin = twin_of(layer)
    with torch.no_grad():
        twin.weight.mul_(2)
    fresh = Fp8().convert(nn.Linear(64, 32).bfloat16(), False)
    fresh.load_state_dict(twin.state_dict())
    expected = fresh(x)
    casts.clear()
    assert torch.equal(twin(x), expected) and torch.equal(twin(x), expected) and len(casts) == 1


def test_no_codes_are_kept_of_a_stand_in(casts):
    layer = Fp8(cache="both").convert(linear(), False)
    layer.load_state_dict(linear(seed=5).state_dict(), assign=True)
    with pytest.warns(UserWarning, match="weights.cache has no effect"):
        layer(torch.randn(4, 64).bfloat16())
    layer(torch.randn(4, 64).bfloat16())
    assert len(casts) == 2


@pytest.mark.parametrize("cache", ["one", "both"])
def test_compiled_with_a_cache_follows_the_weight(cache):
    torch._dynamo.reset()
    layer = Fp8(cache=cache).convert(linear(), False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(16, 64).bfloat16()
    for _ in range(2):
        assert torch.equal(compiled(x), layer(x))
        with torch.no_grad():
            layer.weight.mul_(-2)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", ["one", "both"])
def test_a_frozen_layer_shows_and_saves_the_decoded_weight(scheme, layout):
    plain = linear()
    layer = scheme(layout=layout).convert(copy.deepcopy(plain).requires_grad_(False), True)
    layer.origin = "some/model"
    nbytes = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert nbytes <= plain.weight.numel() * (1 if layout == "one" else 2) + 4 * (2 * 32 + 64) + plain.bias.nbytes
    assert sqnr_db(plain.weight, layer.weight) > (29 if scheme.dtype != torch.int8 else 38)
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (32, 64)
    with pytest.warns(UserWarning, match="decoded weights, not the original ones .some/model."):
        state = layer.state_dict()
    assert list(state) == ["weight", "bias"] and torch.equal(state["weight"], layer.weight)
    other = scheme(layout=layout).convert(linear(seed=3).requires_grad_(False), True)
    other.load_state_dict(state)
    x = torch.randn(5, 64).bfloat16()
    assert sqnr_db(layer(x), other(x)) > 35
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"weight": torch.zeros(32, 48), "bias": torch.zeros(32)})
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"bias": torch.zeros(32)})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layouts_of_a_frozen_weight_have_the_same_gradient_bit_for_bit(scheme):
    def gradient(layout):
        layer = scheme(layout=layout).convert(linear().requires_grad_(False), True)
        x = torch.ones(5, 64, dtype=torch.bfloat16, requires_grad=True)
        layer(x).backward(torch.arange(160.0).reshape(5, 32).bfloat16())
        return x.grad

    one, both = gradient("one"), gradient("both")
    assert torch.equal(one, both) if scheme.dtype != torch.int8 else sqnr_db(both, one) > 35


def test_a_frozen_weight_s_scales_are_found_once():
    layer = Fp8().convert(linear().requires_grad_(False), True)
    with torch.profiler.profile() as seen:
        weight = frozen_transposed_weight(layer._codes(), *layer._backward_scales(), layer.plan)
    names = {event.key for event in seen.key_averages()}
    assert weight.scale.shape == (64,) and not names & {"aten::amax", "aten::div"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_survive_a_change_of_dtype(scheme):
    layer = scheme().convert(linear().requires_grad_(False), True)
    x = torch.randn(5, 64).bfloat16()
    expected = layer(x)
    assert torch.equal(layer.to(torch.float16).to(torch.bfloat16)(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_a_decoded_weight_refuses_to_be_written_to():
    layer = Fp8().convert(linear().requires_grad_(False), True)
    with pytest.raises(UserError, match="lowprec merge"):
        layer.weight.data += 1
    with pytest.raises(UserError, match="lowprec merge"):
        layer.weight.data = torch.zeros(32, 64)
    with pytest.raises(UserError, match="lowprec merge"):
        layer.weight.add_(1)
    with pytest.raises(UserError, match="lowprec merge"):
        torch.ones(32, 64, out=layer.weight)
    assert type(layer.weight + 1) is torch.Tensor
    copied = torch.zeros(32, 64).copy_(layer.weight)
    assert torch.equal(copied, layer.dequantized_weight().float())


def test_a_weight_is_decoded_when_its_numbers_are_needed(monkeypatch):
    layer, decoded = Fp8().convert(linear().float().requires_grad_(False), True), []
    whole = FrozenEightBitLinear.dequantized_weight
    monkeypatch.setattr(FrozenEightBitLinear, "dequantized_weight", lambda self: decoded.append(self) or whole(self))
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((32, 64), torch.float32, "cpu") and not decoded
    assert torch.equal(weight.t().contiguous(), torch.tensor(weight.numpy().T)) and repr(weight).startswith("tensor(")
    assert decoded == [layer]
    model = tiny_model("llama")
    wrap(model, "fp8", frozen=True)
    decoded.clear()
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert not decoded


def test_a_weight_frozen_after_the_conversion_warns_and_names_the_argument():
    layer = Fp8().convert(linear(), False)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    with pytest.warns(UserWarning, match="frozen=True"):
        layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        layer(x)


@pytest.mark.parametrize(
    "fields,text",
    [
        ({"preset": "halo3"}, "weights.preset='halo3'"),
        ({"cache": "all"}, "weights.cache='all'"),
        ({"layout": "none"}, "weights.layout='none'"),
        ({"largest_block": 48}, "weights.largest_block=48"),
        ({"wide_block": 512}, "weights.wide_block=512"),
        ({"forward": Product(rotate="out")}, "weights.forward.rotate='out'"),
        ({"input_gradient": Product(scale="block")}, "weights.input_gradient.scale='block'"),
        ({"weight_gradient": WeightGradient(precision="fp4")}, "weights.weight_gradient.precision='fp4'"),
    ],
)
def test_wrong_fields_are_named(fields, text):
    with pytest.raises(UserError, match=text):
        Fp8(**fields)
