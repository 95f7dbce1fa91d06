"""``lowprec.profile`` around loops that know nothing of it, and the figures by themselves."""

import json
import time

import pytest
import torch
from torch.nn import functional as F

import lowprec
from lowprec.errors import UserError
from lowprec.profiling.charts import scale
from lowprec.profiling.flops import Flops, utilisation
from lowprec.profiling.folder import read
from lowprec.profiling.kernels import kernel_class
from lowprec.profiling.page import page
from lowprec.profiling.table import rows
from lowprec.testing import VOCAB_SIZE, tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(2 * 32).view(2, 32) % 200


def model_and_optimizer(**overrides):
    model = tiny_model("llama", **overrides).train()
    model.config.use_cache = False
    return model, torch.optim.AdamW(model.parameters())


def test_any_loop(tmp_path):
    model, optimizer = model_and_optimizer()
    with lowprec.profile(model, optimizer, warmup_steps=1, steps=2, name="a <loop>") as profile:
        stages = []
        for _ in range(6):
            stages.append(profile.stage)
            time.sleep(0.003)  # the data
            with profile.step(tokens=64, trained_tokens=32):
                model(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert not model._forward_hooks and not any(m._forward_pre_hooks for m in model.modules())
    assert stages == ["warm-up", "measured", "measured", "kernels", "memory", "done"]
    figures = profile.figures()
    assert figures["status"] == "ok" and figures["phases_ms"]["data"] >= 3
    assert all(figures["phases_ms"][phase] > 0 for phase in ("forward", "backward", "optimizer", "other"))
    assert figures["all_tokens_per_second"] == pytest.approx(2 * figures["tokens_per_second"])
    assert "trained tokens/s" in str(profile)
    folder = profile.save(tmp_path / "profile")
    assert json.dumps(read(str(folder))["phases_ms"]) == json.dumps(figures["phases_ms"])
    assert "a &lt;loop&gt;" in (folder / "profile.html").read_text()
    with pytest.raises(UserError, match="not empty"):
        profile.save(folder)


def test_a_loop_that_ends_early_says_so_and_one_that_runs_out_of_memory_too(tmp_path):
    model, optimizer = model_and_optimizer()
    with lowprec.profile(model, optimizer, warmup_steps=1, steps=5) as profile:
        for _ in range(2):
            with profile.step(tokens=64):
                model(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
    figures = profile.figures()
    assert figures["status"] == "incomplete" and figures["steps"] == 1 and figures["memory"] is None
    assert figures["tokens_per_second"] is None and figures["all_tokens_per_second"] > 0
    assert "incomplete" in page(figures) and "incomplete" in str(profile)
    assert "2 of 8 steps" in figures["notes"][0], "warm-up, five, kernels and memory"
    with pytest.raises(torch.OutOfMemoryError), lowprec.profile(model, optimizer) as profile, profile.step():
        raise torch.OutOfMemoryError("no more")
    assert profile.figures()["status"] == "out_of_memory"
    assert "out of memory" in page(profile.figures())


def test_without_a_model_the_whole_step_is_timed():
    with lowprec.profile(warmup_steps=1, steps=2) as profile:
        for _ in range(3):
            with profile.step(tokens=10):
                torch.ones(10).sum()
                time.sleep(0.002)
    assert profile.figures()["step_time_ms_p50"] >= 2
    phases = profile.figures()["phases_ms"]
    assert phases["other"] > phases["data"] and phases["forward"] == 0


def test_flops_are_those_of_the_formula_and_recomputation_is_apart():
    model, _ = model_and_optimizer(num_key_value_heads=4)
    linears = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    attention = 2 * 2 * 2 * 32 * 32 * 64  # layers, products, rows, queries, keys, width; times 2 operations
    with Flops(model) as flops:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert flops.counts["forward", "fp32"] == 2 * linears * IDS.numel() + 2 * attention
    assert flops.counts["backward", "fp32"] == 2 * 2 * linears * IDS.numel() + 5 * attention
    assert ("recomputed", "fp32") not in flops.counts
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with Flops(model) as again:
        model(input_ids=IDS, labels=IDS).loss.backward()
    head = VOCAB_SIZE * 64
    most = 2 * (linears - head) * IDS.numel() + 2 * attention
    assert 0.8 * most < again.counts["recomputed", "fp32"] <= most  # the last product is not needed again
    assert again.counts["backward", "fp32"] == flops.counts["backward", "fp32"]


def test_8_bit_products_are_told_from_16_bit_ones():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 32, bias=False))
    lowprec.wrap(model, "int8_hadamard", rules={"1": "bf16"})
    with Flops(model) as flops:
        model(torch.randn(16, 64)).sum().backward()
    assert flops.counts["forward", "int8"] == 2 * 16 * 64 * 64
    assert flops.counts["forward", "fp32"] == 2 * 16 * 64 * 32


def test_utilisation_holds_each_kind_against_its_own_peak(monkeypatch):
    from collections import Counter

    counts = Counter({("forward", "bf16"): 10**12, ("backward", "int8"): 4 * 10**12, ("recomputed", "bf16"): 10**12})
    peaks = {"bf16": 100.0, "int8": 200.0}
    monkeypatch.setattr("lowprec.profiling.flops.peak_tflops", lambda device: (peaks, "a table"))
    found = utilisation(counts, 0.1, CPU)
    assert found["mfu"] == pytest.approx((0.01 + 0.02) / 0.1) and found["hfu"] == pytest.approx(0.4)
    assert found["mfu_by_kind"] == pytest.approx({"bf16": 0.1, "int8": 0.2}) and found["peak_tflops"] == peaks
    del peaks["int8"]
    assert utilisation(counts, 0.1, CPU)["mfu"] is None


def test_utilisation_is_of_the_measured_speed_where_the_step_that_was_counted_is_longer(monkeypatch):
    """Batches differ: the products of one step go with the tokens of that step, not with the median step."""
    monkeypatch.setattr("lowprec.profiling.flops.peak_tflops", lambda device: ({"fp32": 1.0}, "a table"))
    weight = torch.ones(64, 64, requires_grad=True)
    with lowprec.profile(warmup_steps=1, steps=2) as profile:
        for rows in (32, 32, 32, 32, 320):
            with profile.step(tokens=rows - 8, padding=8):
                (torch.ones(rows, 64) @ weight).sum().backward()
    figures = profile.figures()
    rate = figures["mfu"]["tflop_per_step"]["fp32"] / 320 * figures["padded_tokens_per_second"]
    assert figures["mfu"]["tflop_per_second"] == pytest.approx(rate)


def test_energy_becomes_co2e_by_the_grid_that_is_given(monkeypatch):
    joules = iter(range(0, 10_000, 36))
    source = ("rapl", "a counter", [(lambda: float(next(joules)), 0.0)])
    monkeypatch.setattr("lowprec.machine.energy._cpu_sources", lambda powercap: source)
    with lowprec.profile(warmup_steps=1, steps=2, closely=False, grid_g_co2e_per_kwh=30) as profile:
        for _ in range(3):
            with profile.step(tokens=10, trained_tokens=10):
                torch.ones(10).sum()
    power = profile.figures()["power"]
    assert power["energy_j"] == 72 and power["energy_j_per_token"] == pytest.approx(3.6)
    assert power["co2e_g_per_million_tokens"] == pytest.approx(30), "3.6 MJ are a kWh"
    assert "30 g CO2e a million trained tokens, at 30 g a kWh" in page(profile.figures())


@pytest.mark.parametrize(
    ("most", "marks"),
    [(1.18, [0, 0.25, 0.5, 0.75, 1.0, 1.25]), (0.6, [0, 0.2, 0.4, 0.6]), (79.0, [0, 20, 40, 60, 80]), (0.0, [0, 1])],
)
def test_scales_are_round_numbers(most, marks):
    assert scale(most) == pytest.approx(marks)


def test_parts_that_show_as_nothing_have_no_row():
    figures = {"name": "x", "phases_ms": {"forward": 3.0, "host_sync": 0.001}, "memory": {"peak_gib": 1e-9}}
    labels = [label.strip() for label, _, _ in rows(figures)]
    assert labels == ["forward", "peak of tensors"]
    both = {label.strip(): told for label, told, _ in rows(figures, figures | {"phases_ms": {"host_sync": 7.0}})}
    assert both["host waiting for the device"] == ["0.0 ms", "7.0 ms"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_quantize_rows", "casts"),
        ("_rotate_rows", "rotations"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "casts"),
        ("unrolled_elementwise_kernel<direct_copy_kernel_cuda(...), LoadWithCast<1>, StoreWithCast<1>>", "casts"),
        ("void at::native::vectorized_elementwise_kernel<4, bfloat16_copy_kernel_cuda(...)>", "casts"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(...)>", "memory moves"),
        ("Memcpy HtoD (Pinned -> Device)", "memory moves"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("_persistent", "products"),
        ("_cross_entropy", "loss"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "other"),
        ("void at::native::elementwise_kernel<128, 4, mul_kernel_cuda(...)::{lambda(int)#1}>", "other"),
    ],
)
def test_kernels_are_told_by_their_names(name, kind):
    assert kernel_class(name) == kind


def test_the_loss_of_a_plain_module_counts_as_forward():
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lowprec.profile(model, optimizer, warmup_steps=1, steps=1) as profile:
        while not profile.done:
            with profile.step():
                F.mse_loss(model(torch.ones(4, 8)), torch.zeros(4, 8)).backward()
                optimizer.step()
    assert profile.figures()["phases_ms"]["forward"] > 0 and profile.timeline is not None
