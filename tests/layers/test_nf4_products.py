"""What the products of an NF4 layer read: 16 bits or 8-bit codes, decoded into one buffer."""

import copy
import sys
import threading

import bitsandbytes as bnb
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowprec
from lowprec import ops
from lowprec.adapter import Lora
from lowprec.errors import UserError
from lowprec.layers.decode_buffer import DecodeBuffer, decode_buffer, release_decode_buffers
from lowprec.layers.nf4 import NF4, PRODUCTS
from lowprec.lora import fuse
from lowprec.model import Model, load_model
from lowprec.testing import save_tiny, sqnr_db, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR_DB = {"bf16": 45, "fp8": 27, "int8": 34}
"""Of output and input gradient of normal numbers, against the decoded weight's products."""


def linear(n_in=128, n_out=96, bias=True, dtype=torch.bfloat16, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n_in, n_out, bias=bias).to(DEVICE, dtype)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", [(128, 96), (576, 192), (48, 80)])
def test_output_and_input_gradient(product, shape):
    layer = NF4(product=product).convert(linear(*shape), frozen=True)
    weight = layer.dequantized_weight().double()
    x = torch.randn(3, 40, shape[0], dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    y = layer(x)
    error = torch.randn_like(y)
    y.backward(error)
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16
    assert sqnr_db(x.detach().double() @ weight.T + layer.bias.double(), y) > FLOOR_DB[product]
    assert sqnr_db(error.double() @ weight, x.grad) > FLOOR_DB[product]
    assert sqnr_db(error.double().sum((0, 1)), layer.bias.grad) > 40


def test_nothing_is_kept_for_backward_and_the_buffer_is_one():
    release_decode_buffers()
    kept = []
    x = torch.randn(4, 128, device=DEVICE, requires_grad=True)
    layers = [NF4(product="fp8").convert(linear(128, 128, dtype=torch.float32, seed=i), frozen=True) for i in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = x
        for layer in layers:
            y = layer(y)
    y.sum().backward()
    assert not kept and decode_buffer(x.device).nbytes == 128 * 128  # one byte a weight of one layer
    NF4(product="bf16").convert(linear(128, 256, dtype=torch.float32), frozen=True)(x)
    assert decode_buffer(x.device).nbytes == 4 * 128 * 256


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_decodes_again_and_gives_the_same_bits(reentrant):
    layers = nn.Sequential(*(NF4(product="int8").convert(linear(96, 96, seed=i), frozen=True) for i in range(3)))
    x = torch.randn(8, 96, dtype=torch.bfloat16, device=DEVICE)
    gradients = []
    for run in (layers, lambda z: checkpoint(layers, z, use_reentrant=reentrant)):
        z = x.clone().requires_grad_()
        run(z).square().sum().backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)


def test_several_threads_take_turns_at_the_buffer():
    layers = [
        NF4(product="bf16").convert(linear(256, 64 + 64 * i, dtype=torch.float32, seed=i), True) for i in range(4)
    ]
    x = torch.randn(5, 256, device=DEVICE)
    expected = [layer(x).detach() for layer in layers]
    wrong = []

    def work(layer, y):
        for _ in range(40):
            if not torch.equal(layer(x), y):
                wrong.append(layer)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("product", PRODUCTS)
def test_fused_lora_over_it_equals_pefts(product):
    model = tiny_model("llama")
    lowprec.wrap(model, NF4(product=product), frozen=True)
    plain = Lora(r=4).attach(model)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    fused = copy.deepcopy(plain)
    assert fuse(fused).sizes() == {3: 2, 2: 2, 1: 4}
    ids = torch.arange(24).reshape(2, 12)
    losses = []
    for peft in (plain, fused):
        loss = peft(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    for (name, p), (_, q) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        if p.grad is not None:
            # In 8 bits a last bit of difference in an activation moves some of the next layer's codes by a step.
            assert sqnr_db(p.grad, q.grad) > (90 if product == "bf16" else 30), name


def bnb_layer(n_in=128, n_out=96, compress=True):
    plain = linear(n_in, n_out)
    layer = bnb.nn.Linear4bit(n_in, n_out, compute_dtype=torch.bfloat16, compress_statistics=compress, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    return layer.to(DEVICE)


@pytest.mark.parametrize("compress", [True, False])
def test_a_layer_of_bitsandbytes_is_taken_over_and_saved_as_it_was(compress):
    theirs = bnb_layer(compress=compress)
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    model = nn.Sequential(theirs, nn.Linear(96, 8))
    report = lowprec.wrap(model, NF4(product="fp8"), rules={"1": "bf16"}, frozen=True)
    mine = model[0]
    assert report.rows[0].scheme == "nf4" and "fp8" in report.rows[0].kernel and mine.plan is not None
    after = mine.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        expected = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    torch.testing.assert_close(mine.dequantized_weight(), expected.bfloat16(), rtol=1e-2, atol=1e-6)


def test_a_checkpoint_of_bitsandbytes_loads_unchanged():
    state = bnb_layer().state_dict()
    layer = NF4(product="int8").convert(linear(seed=5), frozen=True)
    scales = layer.row_bits.clone()
    assert layer.load_state_dict(state) == ([], [])
    reference = NF4(product="int8").convert(bnb_layer(), frozen=True)
    assert torch.equal(layer.dequantized_weight(), reference.dequantized_weight())
    assert torch.equal(layer.row_bits, reference.row_bits) and not torch.equal(layer.row_bits, scales)
    x = torch.randn(4, 128, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(layer(x), reference(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        NF4().convert(linear(64, 96), frozen=True).load_state_dict(state)


def test_rows_that_are_no_whole_number_of_blocks_decode_rightly():
    """bitsandbytes 0.50.2 gets them wrong on a processor: 12 to 14 dB, where its own format gives 20."""
    plain = linear(48, 96, dtype=torch.float32)
    weight = plain.weight.detach().clone()
    assert sqnr_db(weight, NF4().convert(plain, frozen=True).dequantized_weight()) > 18


def test_scales_survive_a_change_of_dtype_and_a_copy():
    layer = NF4(product="int8").convert(linear(), frozen=True)
    x = torch.randn(4, 128, dtype=torch.bfloat16, device=DEVICE)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer).to(torch.bfloat16)(x), expected)


def test_auto_without_a_gpu_is_16_bits_and_a_gpu_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if DEVICE == "cpu":
        report = lowprec.wrap(tiny_model("llama", dtype=torch.bfloat16), "nf4", frozen=True)
        assert {row.kernel for row in report.converted} == {"decoded to bfloat16 (cpu)"}
    ms = {"bf16": 3.0, "fp8": 1.0, "int8": 2.0}
    asked = []

    def pretend(layer, tokens, frozen, in_graphs):
        name = "bf16" if layer.plan is None else "int8" if layer.plan.dtype == torch.int8 else "fp8"
        asked.append(name)
        return ms[name]

    monkeypatch.setattr("lowprec.layers.nf4.milliseconds_of", pretend)
    scheme, reason = NF4(min_sqnr_db=20)._verdict(linear(), None)
    assert scheme.product == "fp8" and "3.00x 16 bits" in reason and "normal numbers" in reason
    scheme, reason = NF4()._verdict(linear(), None)
    assert scheme.product == "int8" and asked == ["bf16", "fp8", "int8"]  # times are remembered
    scheme, reason = NF4(min_sqnr_db=60)._verdict(linear(), None)
    assert scheme.product == "bf16" and "is under 60" in reason
    ms["bf16"] = 0.5
    scheme, reason = NF4(tokens=64)._verdict(linear(), None)
    assert scheme.product == "bf16" and "16 bits are best at 64" in reason


def test_what_cannot_run_says_why():
    assert "multiples of 16" in NF4(product="fp8").why_not(linear(24, 40), frozen=True)
    assert NF4().why_not(linear(24, 40), frozen=True) is None
    with pytest.raises(UserError, match=r"weights.product='fp4'.*auto, bf16, fp8, int8"):
        NF4(product="fp4")
    fp4 = bnb.nn.Linear4bit(64, 64, quant_type="fp4").to(DEVICE)
    assert "fp4" in NF4().why_not(fp4, frozen=True)
    with pytest.raises(UserError, match="converted no layer"):
        lowprec.wrap(nn.Sequential(fp4), "nf4", frozen=True)
    backends = sys.modules["lowprec.ops.decode_nf4"].BACKENDS
    stored = NF4().convert(linear(48, 96, dtype=torch.float32), frozen=True).stored
    arguments = (stored, 96, torch.empty(96, 48, device=DEVICE), None, 1, 1, False)
    reasons = [backend.why_not(*arguments) for backend in backends]
    assert reasons[-1] is None and (DEVICE == "cuda" or ("CUDA" in reasons[0] and "whole number" in reasons[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 1024), (1536, 2048)])
def test_backends_agree_on_the_gpu(shape):
    layer = NF4().convert(linear(*shape), frozen=True)
    backends = sys.modules["lowprec.ops.decode_nf4"].BACKENDS
    values = []
    for backend in backends:
        out = torch.empty(shape[1], shape[0], dtype=torch.bfloat16, device="cuda")
        backend.run(layer.stored, shape[1], out, None, 1, 1, False)
        values.append(out)
    assert all(sqnr_db(values[-1], found) > 55 for found in values[:-1])


@pytest.mark.gpu
def test_streams_wait_for_each_other():
    layers = [NF4(product="bf16").convert(linear(2048, 2048, seed=i), frozen=True) for i in range(4)]
    x = torch.randn(2048, 2048, dtype=torch.bfloat16, device="cuda")
    expected = [layer(x) for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(layer(x))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_has_memory_of_its_own():
    layer = NF4(product="fp8").convert(linear(1024, 1024), frozen=True)
    x = torch.randn(256, 1024, dtype=torch.bfloat16, device="cuda")
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    layer(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, expected)


def test_the_buffer_grows_once_and_is_reused():
    buffer = DecodeBuffer(torch.device("cpu"))
    with buffer.lend((4, 8), torch.bfloat16) as a:
        first = a.data_ptr()
        assert a.shape == (4, 8) and a.dtype == torch.bfloat16
    with buffer.lend((2, 8), torch.int8) as b:
        assert b.data_ptr() == first and buffer.nbytes == 64
    with buffer.lend((8, 8), torch.float32):
        assert buffer.nbytes == 256


def test_the_op_can_be_traced():
    from torch._subclasses.fake_tensor import FakeTensorMode

    stored = NF4().convert(linear(), frozen=True).stored
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for part in stored]
        out = torch.empty(96, 128, device=DEVICE)
        assert ops.decode_nf4(*fakes, 96, out) is None


def test_a_model_saved_in_4_bits_is_taken_over_as_transformers_loads_it(tmp_path):
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = save_tiny(tmp_path / "plain", "llama")
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=quantization, device_map={"": DEVICE}, dtype=torch.float32
    )
    packed.save_pretrained(tmp_path / "packed")
    model = load_model(Model(model_name_or_path=str(tmp_path / "packed"), dtype="fp32"), device=DEVICE)
    ids = torch.arange(24, device=DEVICE).reshape(2, 12)
    before = model(input_ids=ids).logits
    report = lowprec.wrap(model, NF4(product="bf16"), frozen=True)
    assert report.counts() == {"nf4": 14, "bf16": 1}
    assert sqnr_db(before, model(input_ids=ids).logits) > 90
    peft = Lora(r=4).attach(model)
    assert sum(map(len, fuse(peft).groups)) == 14
