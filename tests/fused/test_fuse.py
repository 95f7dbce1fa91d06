"""The surgery on one instance: what is recognised, what it computes, and that nothing else in the process changes."""

import copy
import inspect
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lowprec.fused.surgery
from lowprec.fused import fuse, mlp, norm, rope
from lowprec.fused.loss_head import gives_loss
from lowprec.prepare import wrap
from lowprec.testing import ARCHITECTURES, tiny_model

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 272, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
OTHERS = {
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi3": {},
    "qwen2": {},
    "olmo2": {},
}


def model_of(arch: str, seed: int = 0):
    if arch in ARCHITECTURES:
        return tiny_model(arch, seed=seed)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **SHAPE, **OTHERS[arch])).eval()


class Stands:
    """In the place of a function of Liger's: Triton's interpreter cannot pass its kernels a number such as eps."""

    def __init__(self, apply):
        self.apply = apply


def plain_norm(x, weight, eps, offset, casting, row_mode):
    """What Liger's forward gives: the result, the rows and 1 / rms of each."""
    rows = x.reshape(-1, x.shape[-1])
    rstd = torch.rsqrt(rows.float().square().mean(-1) + eps)
    return norm.plain_norm(x, weight, norm.Variant(offset, casting, eps)), rows, rstd


@pytest.fixture
def on_any_device(monkeypatch):
    """Without a GPU: Liger's rotary embedding in Triton's interpreter, the definitions in the place of its others."""
    pytest.importorskip("liger_kernel")
    import liger_kernel.ops as ops

    monkeypatch.setattr(lowprec.fused.surgery, "why_no_liger", lambda device: None)
    if not torch.cuda.is_available():
        monkeypatch.setattr(ops, "LigerSiLUMulFunction", Stands(mlp.PLAIN["SwiGLU"]))
        monkeypatch.setattr(ops, "LigerGELUMulFunction", Stands(mlp.PLAIN["GeGLU"]))
        monkeypatch.setattr(ops.rms_norm, "rms_norm_forward", plain_norm)


def ids(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(2, 256, (rows, length), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


EXPECTED = {
    "llama": {"norm": 5, "mlp": 2, "rope": 2}, "qwen3": {"norm": 9, "mlp": 2, "rope": 2},
    "gemma": {"norm": 5, "mlp": 2, "rope": 2}, "mistral": {"norm": 5, "mlp": 2, "rope": 2},
    "phi": {"rope": 2}, "gpt2": {}, "opt": {}, "gemma2": {"norm": 9, "mlp": 2, "rope": 2},
    "gemma3_text": {"norm": 13, "mlp": 2, "rope": 2}, "granite": {"norm": 5, "mlp": 2, "rope": 2},
    "cohere": {"mlp": 2}, "phi3": {"norm": 5, "mlp": 2, "rope": 2}, "qwen2": {"norm": 5, "mlp": 2, "rope": 2},
    "olmo2": {"norm": 9, "mlp": 2, "rope": 2},
}  # fmt: skip


@pytest.mark.parametrize("arch", EXPECTED)
def test_every_architecture_keeps_its_numbers(arch, on_any_device):
    model = model_of(arch)
    names, state = [n for n, _ in model.named_modules()], list(model.state_dict())
    expected = loss_and_gradients(model)
    rows = fuse(model, CPU)
    assert {row.part: row.modules for row in rows if row.fused and row.part != "loss"} == EXPECTED[arch]
    assert next(row for row in rows if row.part == "loss").fused and gives_loss(model)
    assert [n for n, _ in model.named_modules()] == names and list(model.state_dict()) == state
    loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-3, atol=1e-5, msg=name)


def fingerprint(kind: type[nn.Module]) -> dict:
    return {name: id(value) for name, value in vars(kind).items() if callable(value)}


def test_a_second_model_and_the_modules_of_transformers_stay_untouched(on_any_device):
    other = tiny_model("llama", seed=1)
    kinds = {type(module) for module in other.modules()}
    file = sys.modules[type(other).__module__]
    before = [fingerprint(kind) for kind in kinds], dict(vars(file))
    expected = loss_and_gradients(other)
    fused = tiny_model("llama")
    assert sum(row.fused for row in fuse(fused, CPU)) == 4
    assert not torch.equal(loss_and_gradients(fused)[0], expected[0])  # it runs, on its own weights
    assert [fingerprint(kind) for kind in kinds] == before[0] and dict(vars(file)) == before[1]
    assert not any("forward" in vars(module) for module in other.modules())
    loss, gradients = loss_and_gradients(other)
    assert torch.equal(loss, expected[0]) and all(torch.equal(gradients[n], g) for n, g in expected[1].items())
    third = tiny_model("llama", seed=1)
    assert torch.equal(loss_and_gradients(third)[0], expected[0])


def test_copies_compute_with_their_own_weights(on_any_device):
    model = tiny_model("llama")
    fuse(model, CPU)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert all(m.forward.__self__ is m for m in twin.modules() if "forward" in vars(m))
    assert not torch.equal(loss_and_gradients(model)[0], loss_and_gradients(twin)[0])


@pytest.mark.parametrize("weights", ["bf16", "int8_hadamard", "nf4"])
def test_under_lora_and_over_converted_linears(weights, on_any_device):
    """The kernels stand between the linear layers, whatever those are."""
    results = []
    for use in (False, True):
        model = tiny_model("llama")
        report = wrap(model, weights, frozen=True, use_liger_kernel=use)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.05)
        results.append(loss_and_gradients(model))
        assert {row.part: row.fused for row in report.fused} == {"norm": use, "mlp": use, "rope": use, "loss": True}
    (expected, wanted), (loss, found) = results
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert found.keys() == wanted.keys() and all("lora_" in name for name in found)
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-2, atol=2e-3 * float(scale), msg=name)


def test_off_and_elsewhere_the_report_says_why():
    model = tiny_model("llama")
    off = fuse(model, CPU, use_liger_kernel=False)
    assert {row.reason for row in off if row.part != "loss"} == {"train.use_liger_kernel=false"}
    here = wrap(tiny_model("llama"), "bf16")
    assert all("run on CUDA devices" in row.reason for row in here.fused if row.part != "loss")
    assert "run on CUDA devices" in str(here) and "5 LlamaRMSNorm (norm)" in str(here)
    assert here.to_dict()["fused"][0]["module"] == "LlamaRMSNorm"


def test_what_to_install_is_printed_with_its_brackets(monkeypatch):
    monkeypatch.setattr(lowprec.fused.surgery, "why_no_liger", lambda device: "pip install 'lowprec[cuda]'")
    assert "lowprec[cuda]" in " ".join(str(wrap(tiny_model("llama"), "bf16")).split())


class OtherRMSNorm(nn.Module):
    """RMSNorm in name, and in what attributes it has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class OtherMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


def test_what_computes_something_else_stays_as_it_is(on_any_device):
    model = nn.Sequential(OtherRMSNorm(), OtherMLP())
    before = model(torch.ones(2, 16))
    rows = fuse(model, CPU)
    assert [row.part for row in rows] == ["norm", "mlp"] and not any(row.fused for row in rows)
    assert all("trial on small numbers" in row.reason for row in rows)
    assert torch.equal(model(torch.ones(2, 16)), before)
    again = fuse(tiny := tiny_model("llama"), CPU), fuse(tiny, CPU)
    assert "of its own already" in again[1][0].reason


def test_generation_and_the_signature_stay(on_any_device):
    plain, fused = tiny_model("qwen3"), tiny_model("qwen3")
    fuse(fused, CPU)
    options = {"attention_mask": torch.ones(1, 10, dtype=torch.int64), "max_new_tokens": 6, "do_sample": False,
               "pad_token_id": 256}  # fmt: skip
    assert torch.equal(fused.generate(ids(1), **options), plain.generate(ids(1), **options))
    assert "input_ids" in inspect.signature(fused.forward).parameters


def test_rope_kernel_in_the_interpreter(on_any_device):
    from liger_kernel.ops import LigerRopeFunction

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 16, generator=generator).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(2, 5, 8, generator=generator).repeat(1, 1, 2)
    wanted = rope.plain_rope(q, k, angles.cos(), angles.sin())
    found = LigerRopeFunction.apply(q.clone(), k.clone(), angles.cos(), angles.sin())
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma", "qwen3", "phi3"])
def test_kernels_on_the_gpu_are_as_near_to_fp64_as_the_plain_modules(arch, dtype):
    """Twice the plain path's error at most, of the logits' loss and of every gradient together."""
    exact = loss_and_gradients_of(model_of(arch).double())
    errors = []
    for use in (False, True):
        model = model_of(arch).to(dtype).cuda()
        rows = fuse(model, torch.device("cuda"), use)
        assert all(row.fused is use for row in rows if row.part != "loss"), [str(row) for row in rows]
        errors.append(distance(loss_and_gradients_of(model), exact))
    plain, fused = errors
    assert fused <= 2 * plain + 1e-6


def loss_and_gradients_of(model):
    device = next(model.parameters()).device
    model(input_ids=ids(4, 40).to(device), labels=ids(4, 40).to(device)).loss.backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def distance(found, exact):
    noise = sum((found[name] - exact[name]).square().sum() for name in exact)
    return float((noise / sum(g.square().sum() for g in exact.values())).sqrt())
