"""Fused LoRA against PEFT's own composition, in models."""

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowprec
from lowprec.activations import keep_activations
from lowprec.adapter import Lora
from lowprec.layers.eight_bit_schemes import Fp8, Int8Hadamard
from lowprec.layers.nf4 import NF4
from lowprec.layers.nf4_linear import NF4Linear
from lowprec.lora import fuse
from lowprec.lora.layers import Handoff
from lowprec.testing import ARCHITECTURES, sqnr_db, tiny_model
from lowprec.train.nonfinite import _watch

IDS = torch.arange(24).reshape(2, 12)
GROUPS = {"llama": {3: 2, 2: 2, 1: 4}, "qwen3": {3: 2, 2: 2, 1: 4}, "gemma": {3: 2, 2: 2, 1: 4},
          "mistral": {3: 2, 2: 2, 1: 4}, "phi": {3: 2, 1: 6}, "gpt2": {1: 8}, "opt": {3: 2, 1: 6}}  # fmt: skip


def adapted(arch="llama", dtype=torch.float32, weights="bf16", **options):
    """A model whose B are not zero, and whose adapters have at least fp32."""
    model = tiny_model(arch, dtype=dtype)
    lowprec.wrap(model, weights, frozen=True)
    peft = Lora(r=4, **options).attach(model).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return peft


def both(**kwargs):
    plain = adapted(**kwargs)
    fused = copy.deepcopy(plain)
    return plain, fused, fuse(fused)


def gradients(model, ids=IDS):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype, tolerance, db", [(torch.float64, 1e-12, 240), (torch.float32, 1e-6, 90)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_and_gradients_equal_pefts(arch, dtype, tolerance, db):
    plain, fused, report = both(arch=arch, dtype=dtype)
    assert report.sizes() == GROUPS[arch] and not report.on_peft and not report.notes
    (loss, wanted), (found_loss, found) = gradients(plain), gradients(fused)
    torch.testing.assert_close(found_loss, loss, rtol=tolerance, atol=tolerance)
    assert found.keys() == wanted.keys() and len(found) >= 16
    for name, grad in wanted.items():
        assert found[name].dtype == grad.dtype and sqnr_db(grad, found[name]) > db, name


@pytest.mark.parametrize(
    "weights",
    ["fp8", "int8_hadamard", "fp8_hadamard", Fp8(layout="both"), Int8Hadamard(layout="both"), Fp8(preset="halo2")],
    ids=["fp8", "int8", "fp8_hadamard", "fp8 both", "int8 both", "halo2"],
)
def test_over_an_8_bit_base_the_numbers_are_the_same(weights):
    """The base's codes and their products are the very same, so only the order of sums differs."""
    plain, fused, report = both(weights=weights)
    assert report.sizes() == GROUPS["llama"]
    (loss, wanted), (found_loss, found) = gradients(plain), gradients(fused)
    # A difference in the last bit of an activation moves some of the next layer's codes by a step.
    assert abs(found_loss - loss) < 2e-4 * loss
    assert all(sqnr_db(grad, found[name]) > 30 for name, grad in wanted.items())


def test_bf16_under_autocast_is_as_close_to_fp32_as_pefts():
    wide = adapted(dtype=torch.float32)
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(p.bfloat16() if not p.requires_grad else p)
    plain, fused, _ = both(dtype=torch.bfloat16)
    exact = gradients(wide)[1]
    with torch.autocast("cpu", torch.bfloat16):
        peft, mine = gradients(plain)[1], gradients(fused)[1]
    for name, grad in exact.items():
        assert mine[name].dtype == torch.float32
        assert sqnr_db(grad, mine[name]) > min(sqnr_db(grad, peft[name]) - 3, 40), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_same(reentrant):
    _, fused, _ = both(dtype=torch.float64)
    wanted = gradients(fused)[1]
    fused.train()
    if reentrant:
        fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(fused)[1]
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-14)


def test_what_peft_does_stays_pefts(tmp_path):
    plain, fused, _ = both()
    assert list(plain.state_dict()) == list(fused.state_dict())
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        with plain.disable_adapter(), fused.disable_adapter():
            assert torch.equal(plain(input_ids=IDS).logits, fused(input_ids=IDS).logits)
        torch.testing.assert_close(fused(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        fused.merge_adapter()
        torch.testing.assert_close(fused(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        fused.unmerge_adapter()
        fused.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        fused.set_adapter("other")
        plain.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        plain.set_adapter("other")
        torch.testing.assert_close(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
        fused.set_adapter("default")
    fused.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert type(fused.merge_and_unload()) is type(tiny_model("llama"))


@pytest.mark.parametrize("options, reason", [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "Dora")])
def test_what_cannot_be_fused_is_named(options, reason):
    peft = Lora(r=4, **options).attach(tiny_model("llama"))
    classes = {type(module) for module in peft.modules()}
    report = fuse(peft)
    assert not report.groups and len(report.on_peft) == 14 and classes == {type(module) for module in peft.modules()}
    (why,) = report.reasons()
    assert reason in why and reason in report.summary() and report.to_dict()["reasons"] == {why: 14}


def test_two_adapters_and_trained_bases_take_pefts_path():
    peft = adapted()
    peft.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    peft.base_model.set_adapter(["default", "second"])
    assert set(fuse(peft).reasons()) == {"2 adapters are active"}
    peft = adapted()
    peft.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight.requires_grad_(True)
    report = fuse(peft)
    assert report.reasons() == {"its base weight is trained": 1} and sum(map(len, report.groups)) == 13


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_of_the_base_get_their_gradients(bias):
    plain, fused, _ = both(arch="opt", dtype=torch.float64, bias=bias)
    wanted, found = gradients(plain)[1], gradients(fused)[1]
    assert found.keys() == wanted.keys() and any(name.endswith("base_layer.bias") for name in found)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-12)


def test_a_nan_is_traced_to_the_fused_layer_where_it_arose():
    _, fused, _ = both()
    fused.base_model.model.model.layers[1].self_attn.k_proj.lora_A["default"].weight.data[0, 0] = torch.nan
    origin: list[str] = []
    with _watch(fused, origin), torch.no_grad():
        fused(input_ids=IDS)
    assert origin[0].endswith("layers.1.self_attn.k_proj")


def test_another_model_is_untouched():
    other = adapted()
    before = {name: type(module) for name, module in other.named_modules()}
    fuse(adapted())
    assert before == {name: type(module) for name, module in other.named_modules()}
    assert not any(hasattr(module, "place") for module in other.modules())


class Odd(nn.Module):
    """A block that calls its projections in ways that a Llama does not."""

    def __init__(self, way):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.way = way

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        q = self.q_proj(x)
        if self.way == "raises" and input_ids.shape[-1] == 5:
            raise RuntimeError("in between")
        if self.way == "in place" and input_ids.shape[-1] == 5:
            x.mul_(2)
        if self.way == "skips" and input_ids.shape[-1] == 5:
            return q
        if self.way == "another input":
            x = x + 1
        k = self.k_proj(x)
        if self.way == "twice":
            k = k + self.k_proj(q)
        return q + k * self.v_proj(x)


def odd(way):
    torch.manual_seed(0)
    peft = get_peft_model(Odd(way), LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return peft, copy.deepcopy(peft)


@pytest.mark.parametrize("way, sizes", [("in place", {3: 1}), ("skips", {3: 1}), ("another input", {2: 1, 1: 1}),
                                        ("twice", {1: 3})])  # fmt: skip
def test_whatever_order_a_model_calls_its_layers_in_the_result_is_right(way, sizes):
    plain, fused = odd(way)
    assert fuse(fused).sizes() == sizes
    for length in (5, 3):
        ids = torch.arange(length)[None]
        with torch.no_grad():
            torch.testing.assert_close(fused(input_ids=ids), plain(input_ids=ids))
    assert no_leftovers(fused)


def no_leftovers(model):
    handoffs = {id(m.place.handoff): m.place.handoff for m in model.modules() if hasattr(m, "place")}
    (handoff,) = handoffs.values()
    return isinstance(handoff, Handoff) and handoff._x is None and not handoff._waiting


def test_nothing_outlives_a_pass_that_failed():
    plain, fused = odd("raises")
    fuse(fused)
    with pytest.raises(RuntimeError, match="in between"):
        fused(input_ids=torch.arange(5)[None])
    assert no_leftovers(fused)
    torch.testing.assert_close(fused(input_ids=IDS[:1, :4]), plain(input_ids=IDS[:1, :4]))


def test_a_model_that_cannot_be_tried_is_fused_layer_by_layer():
    _, fused = odd("another input")
    fused.base_model.model.forward = None
    report = fuse(fused)
    assert report.sizes() == {1: 3} and "trial run failed" in report.summary()


def test_the_trial_run_leaves_no_trace():
    peft = adapted().train()
    peft.base_model.model.model.layers[0].eval()
    modes, chance = [m.training for m in peft.modules()], torch.get_rng_state()
    fuse(peft)
    assert modes == [m.training for m in peft.modules()] and torch.equal(chance, torch.get_rng_state())


def test_a_group_keeps_its_input_once_and_the_small_product():
    def kept(model):
        sizes: dict[int, int] = {}

        def pack(tensor):
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        projections = model.base_model.model.model.layers[0].self_attn
        x = torch.randn(1, 64, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = [layer(x) for layer in (projections.q_proj, projections.k_proj, projections.v_proj)]
        return sum(sizes.values()), outputs

    plain, fused, _ = both()
    assert kept(fused)[0] == 64 * 64 * 4 + 64 * 12 * 4  # X, and L of three ranks of 4
    assert kept(fused)[0] < kept(plain)[0]


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
@pytest.mark.parametrize("product", ["bf16", "int8"])
def test_every_policy_for_activations_gives_the_same_bits(policy, product):
    _, fused, _ = both(weights=NF4(product=product))
    wanted = gradients(fused)[1]
    fused.train()
    keep_activations(fused, policy)
    for _ in range(2):  # selective measures in the first pass
        found = gradients(fused)[1]
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_ranks_and_scalings_may_differ_within_a_group():
    plain, fused, report = both(rank_pattern={"q_proj": 2, "up_proj": 8}, alpha_pattern={"k_proj": 3, "gate_proj": 64})
    assert report.sizes() == GROUPS["llama"]
    (loss, wanted), (found_loss, found) = gradients(plain), gradients(fused)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=1e-6)
    assert found.keys() == wanted.keys()
    assert all(sqnr_db(grad, found[name]) > 90 for name, grad in wanted.items())


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_the_last_products_of_a_layer_are_not_computed_again(policy):
    _, fused, _ = both(weights=NF4(product="bf16"))
    fused.train()
    keep_activations(fused, policy)
    gradients(fused)  # selective measures in the first pass
    calls = Counter()
    with pytest.MonkeyPatch.context() as patch:
        real = NF4Linear.base_product

        def count(layer, *args):
            calls[layer] += 1
            return real(layer, *args)

        patch.setattr(NF4Linear, "base_product", count)
        gradients(fused)
    for name, layer in fused.named_modules():
        if isinstance(layer, NF4Linear):
            assert calls[layer] == (1 if "down_proj" in name else 2), name


def test_adapters_that_change_between_forward_and_backward_are_refused():
    _, fused, _ = both()
    loss = fused(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        fused.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_group_casts_its_adapters_at_once():
    """Each operation is a kernel to launch: on a small batch the host is what takes the time of a step."""
    _, fused, _ = both(dtype=torch.bfloat16)
    layer = fused.base_model.model.model.layers[0].mlp
    operations = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            operations[operation.overloadpacket.__name__] += 1
            return operation(*args, **(kwargs or {}))

    x = torch.randn(6, 64, dtype=torch.bfloat16, requires_grad=True)
    with Count():
        gate, up = layer.gate_proj(x), layer.up_proj(x)
        torch.autograd.backward([gate, up], [torch.ones_like(gate), torch.ones_like(up)])
    assert operations["_foreach_copy_"] == 2  # forward and backward
    assert operations["_to_copy"] == 3  # to fp32: the gradient of both A, and those of each B
    products = [name for name in operations if name in ("mm", "addmm", "addmm_", "mul", "mul_", "cat")]
    assert sum(operations[name] for name in products) == 13, operations


@pytest.mark.gpu
@pytest.mark.parametrize(
    "weights", ["bf16", "fp8", NF4(product="bf16"), NF4(product="fp8"), NF4(product="int8")], ids=str
)
def test_on_the_gpu_it_is_as_close_to_fp64_as_pefts(weights):
    torch.manual_seed(0)
    config = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_model("llama", dtype=torch.bfloat16, **config).cuda()
    lowprec.wrap(model, weights, frozen=True)
    plain = Lora(r=16).attach(model)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    fused = copy.deepcopy(plain)
    assert fuse(fused).sizes() == GROUPS["llama"]
    ids = torch.randint(0, 256, (2, 128), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        (loss, wanted), (found_loss, found) = gradients(plain, ids), gradients(fused, ids)
    assert abs(loss - found_loss) < 1e-2 * loss
    # Two runs in bf16 differ from each other by their roundings, those of 8-bit products by theirs.
    assert all(sqnr_db(grad, found[name]) > 20 for name, grad in wanted.items())
    for policy in ("full", "selective", "offload"):
        fused.train()
        keep_activations(fused, policy)
        with torch.autocast("cuda", torch.bfloat16):
            again = gradients(fused, ids)[1]
        assert all(sqnr_db(found[name], grad) > 30 for name, grad in again.items()), policy
