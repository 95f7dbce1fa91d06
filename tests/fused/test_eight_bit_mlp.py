"""MLPs of trained 8-bit layers in whole models: who takes which path, what the report says, and the same bits."""

import copy

import pytest
import torch
from lowprec_kernels.gated_rows import reference
from peft import LoraConfig, get_peft_model

from lowprec.activations import keep_activations
from lowprec.fused import fuse, mlp
from lowprec.layers import gated_mlp
from lowprec.layers.eight_bit_schemes import Fp8
from lowprec.layers.products import WeightGradient
from lowprec.prepare import wrap
from lowprec.testing import tiny_model
from tests.fused.test_fuse import Stands, ids, loss_and_gradients, model_of, on_any_device  # noqa: F401
from tests.layers.test_gated_mlp import Composed

pytestmark = pytest.mark.usefixtures("on_any_device", "on_the_processor")


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The kind of product of each call of an MLP whose layers are computed together."""
    calls = []
    plain = gated_mlp.gated_mlp
    monkeypatch.setattr(gated_mlp, "gated_mlp", lambda *args: calls.append(args[-1]) or plain(*args))
    return calls


@pytest.fixture
def on_the_processor(monkeypatch):
    """Also where there is a GPU; in the place of Liger's products what rounds where they do, which PyTorch's own
    operations do not."""
    import liger_kernel.ops as ops

    monkeypatch.setattr(mlp, "runs_on", lambda x: True)
    for name, kind in (("LigerSiLUMulFunction", "SwiGLU"), ("LigerGELUMulFunction", "GeGLU")):
        monkeypatch.setattr(ops, name, Stands(lambda gate, up, kind=kind: Composed.apply(gate, up, kind)))


def rows_of(report) -> list[tuple[int, str, str]]:
    return [(row.modules, row.kernel.split(" with")[0].split(" ")[0], row.note) for row in report if row.part == "mlp"]


def trained(arch: str = "llama", weights="fp8", **options):
    """A model in training mode, and its report. In fp32: Liger's rotary embedding is interpreted, without bf16."""
    model = tiny_model(arch, **options)
    return model.train(), wrap(model, weights, frozen=False)


@pytest.mark.parametrize("arch,kind", [("llama", "SwiGLU"), ("gemma", "GeGLU"), ("qwen3", "SwiGLU")])
def test_models_have_the_bits_of_layers_one_by_one(arch, kind, called, monkeypatch):
    model, report = trained(arch)
    assert [row.kernel for row in report.fused if row.part == "mlp"] == [
        f"lowprec {kind} with its layers' casts to e4m3"
    ]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loss, gradients = loss_and_gradients(model)
    assert called == [kind, kind]
    monkeypatch.setattr(gated_mlp, "takes", lambda *layers: False)
    expected, wanted = loss_and_gradients(model)
    assert len(called) == 2 and torch.equal(loss, expected) and gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    assert model.state_dict().keys() == tiny_model(arch).state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_policies_change_no_bit(policy, called):
    model, _ = trained(use_cache=False)
    loss, gradients = loss_and_gradients(model)
    again = copy.deepcopy(model)
    keep_activations(again, policy)
    for _ in range(2):  # selective watches the first step
        found, mine = loss_and_gradients(again)
        assert torch.equal(found, loss) and all(torch.equal(mine[name], g) for name, g in gradients.items())
    assert len(called) > 4


def test_mlps_that_are_left_apart_say_why():
    def notes(weights="fp8", rules=None, frozen=False, arch="llama", **options):
        model = model_of(arch) if arch == "phi3" else tiny_model(arch, **options)
        return rows_of(wrap(model.bfloat16(), weights, frozen=frozen, rules=rules).fused)

    assert notes() == [(2, "lowprec", "")]
    apart = "casts to 8 bits apart: "
    assert notes(rules={"*.1.mlp.up_proj": "bf16"}) == [
        (1, "lowprec", ""), (1, "Liger", f"{apart}its up layer is a Linear")
    ]  # fmt: skip
    sixteen = Fp8(weight_gradient=WeightGradient(precision="bf16"))
    for weights in ("int8_hadamard", "fp8_hadamard", sixteen):
        assert notes(weights) == [
            (2, "Liger", f"{apart}not all products of its gate layer are plain e4m3 ones: row scales, no rotation")
        ]
    assert notes(arch="phi3") == [(2, "Liger", f"{apart}one layer gives gate and up")]
    assert notes(mlp_bias=True) == [
        (2, "Liger", f"{apart}its gate layer has a bias, whose gradient needs the errors in 16 bits")
    ]
    assert notes(frozen=True) == notes("bf16") == [(2, "Liger", "")]


def test_the_printed_report_has_the_note():
    report = trained(weights=Fp8(preset="halo0"))[1]
    line = next(line for line in report.fused_lines() if "(mlp)" in line)
    assert "SwiGLU (casts to 8 bits apart: not all products" in line and line.endswith("2 LlamaMLP (mlp).")
    row = next(row for row in report.to_dict()["fused"] if row["part"] == "mlp")
    assert row["note"].startswith("casts to 8 bits apart") and row["reason"] == ""


def test_adapters_and_evaluations_take_the_layers_one_by_one(called):
    model, _ = trained()
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids()).logits
    plain = tiny_model("llama")
    fuse(plain, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(evaluated, plain(input_ids=ids()).logits)  # 16 bits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["gate_proj"]))
    with pytest.warns(UserWarning, match="has a frozen weight now"):
        loss_and_gradients(adapted.train())
    assert not called


def test_compiled_layers_are_left_to_the_compiler(called):
    model, _ = trained()
    torch._dynamo.reset()
    torch.compile(model.model.layers[0].mlp, backend="eager", fullgraph=True)(torch.randn(4, 64))
    assert not called


def test_where_liger_does_not_run_the_model_s_own_code_stays(called, monkeypatch):
    monkeypatch.setattr(mlp, "runs_on", lambda x: False)
    model, _ = trained()
    loss_and_gradients(model)
    assert not called and tuple(mlp.PLAIN) == reference.KINDS
