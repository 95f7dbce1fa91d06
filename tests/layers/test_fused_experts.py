"""Fused experts in 8 bits: their products against fp64, whole models, what is saved, and why some stay as they are."""

import copy
import pickle
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowprec.errors import UserError
from lowprec.layers import fused_experts
from lowprec.layers.eight_bit_schemes import Fp8
from lowprec.layers.expert_weights import FrozenExpertWeights
from lowprec.ops.scaled_grouped_matmul import no_grouped_product
from lowprec.prepare import wrap
from lowprec.profiling.flops import Flops
from lowprec.testing import sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:Only", "ignore:.*deprecated")
ARCHITECTURES = ("qwen3_moe", "mixtral", "olmoe", "nemotron_h")  # the last has no gate
SHAPE = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 259, "pad_token_id": 256,
}  # fmt: skip
NEMOTRON = {
    "layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "head_dim": 16,
    "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def tiny_moe(arch: str, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = SHAPE | (NEMOTRON if arch == "nemotron_h" else {}) | overrides
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **fields)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.1)  # else experts add next to nothing to the residual stream
    return model.requires_grad_(False)


def experts_of(model: nn.Module) -> nn.Module:
    return next(m for name, m in model.named_modules() if name.endswith(".experts"))


def loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def weights(experts: int = 4, out: int = 48, into: int = 64, layout: str = "one", dtype: torch.dtype = torch.float32):
    plain = torch.randn(experts, out, into, generator=torch.Generator().manual_seed(0))
    plain *= torch.logspace(-2, 1, out)[:, None]  # rows of very different scales
    return plain.to(dtype), FrozenExpertWeights(plain.to(dtype), layout, True, False)


def ends_of(sizes) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["one", "both"])
@pytest.mark.parametrize("sizes", [(100, 3, 60, 1), (0, 164, 0, 0), (1, 0, 0, 0)], ids=str)
def test_products_against_fp64(sizes, layout, dtype):
    plain, coded = weights(layout=layout, dtype=dtype)
    rows, expert_of = sum(sizes), torch.arange(4).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 64, generator=generator).to(dtype).requires_grad_()
    error = torch.randn(rows, 48, generator=generator).to(dtype)
    y = coded(x, ends_of(sizes))
    (grad,) = torch.autograd.grad(y, x, error)
    assert y.dtype == grad.dtype == dtype
    stored, given_ = coded.dequantized_weight(), plain.double()
    assert stored.dtype == dtype and sqnr_db(given_, stored) > 28
    exact_y = torch.einsum("ri,roi->ro", x.detach().double(), given_[expert_of])
    exact_grad = torch.einsum("ro,roi->ri", error.double(), given_[expert_of])
    least = 25 if rows > 1 else 18  # one error's largest numbers weigh on all of its gradient
    assert sqnr_db(exact_y, y) > least and sqnr_db(exact_grad, grad) > least


def test_layouts_give_the_same_bits():
    sizes = (5, 0, 7, 1)
    x, error = torch.randn(13, 64, requires_grad=True), torch.randn(13, 48)
    results = []
    for layout in ("one", "both"):
        y = weights(layout=layout)[1](x, ends_of(sizes))
        results.append([y, *torch.autograd.grad(y, x, error)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_rows_do_not_depend_on_the_other_groups(sizes):
    """A row's result and gradient are those that it has alone, and no row is left out."""
    _, coded = weights(experts=3)
    x = torch.randn(sum(sizes), 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = coded(x, ends_of(sizes))
    (grad,) = torch.autograd.grad(y.sum(), x)
    expert_of = torch.arange(3).repeat_interleave(torch.tensor(sizes)).tolist()
    for row, expert in enumerate(expert_of):
        alone = x[row : row + 1].detach().requires_grad_()
        y_alone = coded(alone, ends_of([int(e == expert) for e in range(3)]))
        torch.testing.assert_close(y[row : row + 1], y_alone)
        torch.testing.assert_close(grad[row : row + 1], torch.autograd.grad(y_alone.sum(), alone)[0])


def test_rows_of_zeros_and_of_nan():
    plain, _ = weights()
    plain[1] = 0
    plain[2, 3] = float("nan")
    coded = FrozenExpertWeights(plain, "one", True, False)
    x = torch.randn(4, 64)
    x[3] = float("nan")
    x.requires_grad_()
    y = coded(x, ends_of([1, 1, 1, 1]))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y[0].isfinite().all() and grad[0].isfinite().all()
    assert (y[1] == 0).all() and (grad[1] == 0).all()
    assert y[2].isnan().nonzero().tolist() == [[3]] and grad[2].isnan().all()
    assert y[3].isnan().all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_models_against_their_16_bit_experts(arch):
    base = tiny_moe(arch)
    model = copy.deepcopy(base)
    report = wrap(model, "fp8")
    rows = [row for row in report.rows if "experts" in row.name and len(row.shape) == 3]
    assert rows and all(row.scheme == "fp8" and "float8_e4m3fn" in row.kernel and not row.reason for row in rows)
    assert any("no adapter" in note for note in report.notes)
    plain, coded = experts_of(base), experts_of(model)
    assert type(coded) is type(plain) and base.config._experts_implementation != coded.config._experts_implementation
    assert model.config._experts_implementation == base.config._experts_implementation
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(37, 64, generator=generator)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(37)])  # nobody visits the fourth
    mix, error = torch.rand(37, 2, generator=generator), torch.randn(37, 64, generator=generator)
    for tokens in (37, 1):
        results = []
        for experts in (plain, coded):
            leaves = [hidden[:tokens].clone().requires_grad_(), mix[:tokens].clone().requires_grad_()]
            y = experts(leaves[0], chosen[:tokens], leaves[1])
            results.append([y, *torch.autograd.grad(y, leaves, error[:tokens])])
        for a, b in zip(*results, strict=True):  # two products in e4m3 behind each other
            assert sqnr_db(a, b) > (21 if tokens > 1 else 10)  # then a gradient has two numbers
    assert abs(loss(model).item() - loss(base).item()) < 2e-2


def test_empty_input():
    model = tiny_moe("qwen3_moe")
    wrap(model, "fp8")
    hidden = torch.empty(0, 64, requires_grad=True)
    y = experts_of(model)(hidden, torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    y.sum().backward()
    assert y.shape == (0, 64) and hidden.grad.shape == (0, 64)


def test_memory_and_report():
    model = tiny_moe("qwen3_moe", torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    plain = [weakref.ref(p) for p in model.parameters() if p.ndim == 3]
    report = wrap(model, "fp8", rules={"*self_attn*": "bf16"})
    assert plain and all(reference() is None for reference in plain)
    assert report.parameter_share == pytest.approx(inside / total)
    row = next(row for row in report.rows if row.name.endswith("experts.gate_up_proj"))
    assert row.shape == [4, 64, 64] and row.flops_per_token == row.parameters  # 2 of 4 experts
    assert "model.layers.*.mlp.experts.gate_up_proj" in str(report)
    codes = [m for m in model.modules() if isinstance(m, FrozenExpertWeights)]
    stored = sum(p.nbytes for m in codes for p in (*m.parameters(), *m.buffers()))
    assert inside < stored < 1.25 * inside  # scales weigh on rows of 32 and 64
    model.to(torch.float32)
    assert codes[0].weight.dtype == torch.int8 and loss(model).isfinite()


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral"])
def test_what_is_saved_are_the_decoded_weights_under_their_names(arch, tmp_path):
    model = tiny_moe(arch, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrap(model, "fp8", rules={"*self_attn*": "bf16"})
    with pytest.warns(UserWarning, match="decoded weights"):
        state = model.state_dict()
    assert set(state) == set(before) and all(state[n].dtype == t.dtype for n, t in before.items())
    coded = [name for name, tensor in before.items() if tensor.ndim == 3]
    assert len(coded) == 4 and all(sqnr_db(before[n], state[n]) > 28 for n in coded)
    with pytest.warns(UserWarning, match="decoded weights"):
        model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())

    twin = tiny_moe(arch, torch.bfloat16)
    nn.init.ones_(experts_of(twin).down_proj)
    wrap(twin, "fp8", rules={"*self_attn*": "bf16"})
    assert twin.load_state_dict(state).missing_keys == []
    assert torch.equal(loss(twin), loss(model))
    missing, unexpected = twin.load_state_dict({"model.layers.0.mlp.experts.x": torch.ones(1)}, strict=False)
    assert set(coded) <= set(missing) and unexpected == ["model.layers.0.mlp.experts.x"]
    with pytest.raises(RuntimeError, match="size mismatch for model.layers.0.mlp.experts.down_proj"):
        twin.load_state_dict(state | {"model.layers.0.mlp.experts.down_proj": torch.ones(4, 16, 16)})


def test_copies_and_pickles_compute_the_same():
    model = tiny_moe("qwen3_moe")
    wrap(model, "fp8")
    expected = loss(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss(twin), expected)


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "olmoe"])
def test_lora_trains_over_frozen_experts(arch):
    model = tiny_moe(arch, torch.bfloat16)
    base = copy.deepcopy(model)
    wrap(model, "fp8", frozen=True)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"]))
    assert abs(loss(model).item() - loss(base).item()) < 5e-2
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = []
    for _ in range(8):
        losses.append(loss(model))
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


def test_autocast():
    model = tiny_moe("qwen3_moe", torch.bfloat16)
    wrap(model, "fp8")
    experts = experts_of(model)
    hidden, chosen, mix = torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts.gate_up_proj_codes(hidden, ends_of([5, 0, 0, 0])).dtype == torch.bfloat16
        y = experts(hidden, chosen, mix)
    assert y.dtype == torch.float32 and y.isfinite().all()


def test_operations_are_counted():
    model = tiny_moe("qwen3_moe")
    wrap(model, "fp8")
    with Flops() as flops:
        hidden = torch.randn(5, 64, requires_grad=True)
        experts_of(model)(hidden, torch.tensor([[0, 3]] * 5), torch.rand(5, 2)).sum().backward()
    expected = 2 * 10 * (64 * 64 + 32 * 64)  # 5 tokens visit 2 experts each
    assert flops.counts == {("forward", "fp8"): expected, ("backward", "fp8"): expected}


def test_one_graph_without_breaks():
    model = tiny_moe("qwen3_moe")
    wrap(model, "fp8")
    experts = experts_of(model)
    hidden, chosen, mix = torch.randn(5, 64, requires_grad=True), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    y = experts(hidden, chosen, mix)
    (expected,) = torch.autograd.grad(y.sum(), hidden)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")(hidden, chosen, mix)
    torch.testing.assert_close(compiled, y)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), hidden)[0], expected)


@pytest.mark.parametrize(
    "arch,overrides,weights,options,expected",
    [
        ("mixtral", {}, "fp8", {"frozen": False}, "they are trained"),
        ("mixtral", {}, "int8_hadamard", {}, "not those of int8_hadamard"),
        ("mixtral", {}, "fp8_hadamard", {}, "not those of fp8_hadamard"),
        ("mixtral", {}, Fp8(preset="halo0"), {}, "unrotated with row scales"),
        ("mixtral", {}, "fp8", {"rules": {"*.experts": "bf16"}}, "16 bits were asked for"),
        ("mixtral", {"intermediate_size": 24}, "fp8", {}, "multiples of 16, each is 64 x 24"),
        ("gpt_oss", {"head_dim": 16}, "fp8", {}, r"GptOssExperts stores its weights as \[experts, in, out\]"),
    ],
)
def test_why_experts_stay_as_they_are(arch, overrides, weights, options, expected):
    model = tiny_moe(arch, **overrides)
    rows = [row for row in wrap(model, weights, **options).rows if len(row.shape) == 3]
    assert rows and all(row.scheme == "bf16" and row.kernel == "the model's own" for row in rows)
    for row in rows:
        share = row.parameters / sum(p.numel() for p in model.parameters())
        assert re.match(f"fused experts, {share:.1%} of the model's parameters: .*{expected}", row.reason)
    assert loss(model).isfinite()


def test_what_a_module_or_a_device_lacks_is_named(monkeypatch):
    experts = experts_of(tiny_moe("mixtral"))
    monkeypatch.setattr(fused_experts, "no_grouped_product", lambda device: f"none on {device}")
    assert fused_experts.why_not(experts, Fp8(), True) is None
    assert fused_experts.why_not(experts, Fp8(), True, "cuda") == "none on cuda"
    experts._is_expert_parallel = True
    assert "spread over processes" in fused_experts.why_not(experts, Fp8(), True)
    plain = nn.Module()
    plain.experts = nn.Parameter(torch.ones(2, 16, 16))
    assert "does not let its product be chosen" in fused_experts.why_not(plain, Fp8(), True)
    assert "not loaded" in fused_experts.why_not(experts_of(tiny_moe("mixtral")).to("meta"), Fp8(), True)


def test_a_rule_names_experts_and_what_is_converted_stays_so():
    model = tiny_moe("qwen3_moe")
    report = wrap(model, "int8_hadamard", rules={"*.experts": "fp8"})
    assert report.counts() == {"int8_hadamard": 8, "fp8": 4, "bf16": 1}
    with pytest.raises(UserError, match="in 8 bits already"):
        wrap(model, "fp8")


def step_of(experts: nn.Module, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden, error = (torch.randn(301, 64, generator=generator).bfloat16().to(device) for _ in range(2))
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(301)]).to(device)
    mix = torch.rand(301, 2, generator=generator).bfloat16().to(device).requires_grad_()
    hidden.requires_grad_()

    def step() -> list[torch.Tensor]:
        y = experts(hidden, chosen, mix)
        return [y, *torch.autograd.grad(y, [hidden, mix], error)]

    step()  # compiles
    if device == "cpu":
        return step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["one", "both"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_numbers_on_the_gpu_without_a_host_sync(arch, layout):
    if reason := no_grouped_product(torch.device("cuda")):
        pytest.skip(reason)
    on_cpu, on_gpu = tiny_moe(arch, torch.bfloat16), tiny_moe(arch, torch.bfloat16)
    wrap(on_cpu, Fp8(layout=layout))
    report = wrap(on_gpu, Fp8(layout=layout), device="cuda")
    on_gpu.cuda()
    rows = [row for row in report.rows if len(row.shape) == 3]
    assert rows and all(row.kernel.startswith("torch._scaled_grouped_mm") for row in rows)
    for a, b in zip(step_of(experts_of(on_cpu), "cpu"), step_of(experts_of(on_gpu), "cuda"), strict=True):
        assert sqnr_db(a, b.cpu()) > 25  # a code may be off by one


@pytest.mark.gpu
def test_lora_trains_on_the_gpu():
    if reason := no_grouped_product(torch.device("cuda")):
        pytest.skip(reason)
    model = tiny_moe("qwen3_moe", torch.bfloat16)
    wrap(model, "fp8", device="cuda")
    model = get_peft_model(model.cuda(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
