"""What only a CUDA device can show: no waiting inside a step, exact resume, running out of memory, 4-bit bases."""

import pytest
import torch
from rich.console import Console

from lowprec.config import resolve
from lowprec.plan import Planner, model_config
from lowprec.plan.run import find_machine
from lowprec.run_folder import read_metrics, read_report
from lowprec.testing import save_tiny
from lowprec.train.interrupt import StopRequest
from lowprec.train.launch import claim_run_folder, start_accelerator
from lowprec.train.loop import Run
from lowprec.train.out_of_memory import OutOfMemoryError
from tests.train.conftest import run
from tests.train.test_resume import settled

pytestmark = pytest.mark.gpu

KINDS = {
    "full": ("full", "model.dtype=bf16"),
    "full_unclipped": ("full", "model.dtype=bf16", "train.max_grad_norm=null", "train.gradient_accumulation_steps=1"),
    "lora": ("lora", "model.dtype=bf16"),
    "qlora": ("qlora_nf4", "model.dtype=bf16"),
    "adamw_8bit": ("full", "model.dtype=bf16", "optimizer=adamw_8bit"),
    "paged_adamw_8bit": ("full", "model.dtype=bf16", "optimizer=paged_adamw_8bit"),
    "cpu_states": ("full", "model.dtype=bf16", "state_store=cpu"),
    "embeddings_on_the_host": ("lora", "model.dtype=bf16", "train.offload_embeddings=true"),
    "fp16_lora": ("lora", "model.dtype=fp16"),
    "lora_in_graphs": ("lora", "model.dtype=bf16", "train.cuda_graphs=true"),
    "packed_in_graphs": ("lora", "model.dtype=bf16", "train.cuda_graphs=true", "data.packing=true"),
    "full_in_graphs": ("full", "model.dtype=bf16", "train.cuda_graphs=true", "train.gradient_checkpointing=full"),
    "full_kernel_by_kernel": ("full", "model.dtype=bf16", "train.cuda_graphs=false"),
    "lora_kernel_by_kernel": ("lora", "model.dtype=bf16", "train.cuda_graphs=false"),
    "qlora_kernel_by_kernel": ("qlora_nf4", "model.dtype=bf16", "train.cuda_graphs=false"),
}  # fmt: skip
"""Layers are replayed as CUDA graphs by default."""


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_resumes_bit_identically(kind, arguments, tmp_path):
    recipe, *extra = KINDS[kind]
    run(recipe, arguments(*extra, "train.save_steps=3", "train.max_steps=12", output="whole"))
    report = read_report(tmp_path / "whole")
    assert report["eval_loss_after"] < report["eval_loss_before"] and report["peak_vram_gib"] > 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-9"
    again = (f'train.resume_from_checkpoint="{checkpoint}"', "train.max_steps=12")
    run(recipe, arguments(*extra, *again, output="resumed"))
    assert settled(tmp_path / "resumed")[1] == settled(tmp_path / "whole")[1]
    losses = [[r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r][-3:] for name in ("whole", "resumed")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("recipe", "extra"),
    [
        ("full", ()),
        ("full", ("data.packing=true",)),
        ("full", ("train.cuda_graphs=false",)),
        ("full", ("train.cuda_graphs=false", "data.packing=true")),
        ("lora", ("train.cuda_graphs=false",)),
        ("qlora_nf4", ("train.cuda_graphs=false",)),
        ("full", ("train.cuda_graphs=true",)),
        ("full", ("train.gradient_checkpointing=full", "train.cuda_graphs=true")),
        ("lora", ("train.gradient_checkpointing=offload", "train.cuda_graphs=true")),
        ("qlora_nf4", ("train.gradient_checkpointing=full", "train.cuda_graphs=true")),
        ("full", ("train.gradient_checkpointing=full",)),
        ("full", ("train.gradient_checkpointing=selective",)),
        ("full", ("train.gradient_checkpointing=offload",)),
        ("lora", ()),
        ("lora", ("train.use_liger_kernel=false",)),
        ("lora", ("train.offload_embeddings=true",)),
        ("qlora_nf4", ()),
        ("qlora_nf4", ("data.packing=true", "train.gradient_checkpointing=offload")),
    ],
)
def test_a_step_never_waits_for_the_device(recipe, extra, arguments, tmp_path):
    keys = dict(pair.split("=", 1) for pair in arguments("model.dtype=bf16", *extra))  # the last of a key wins
    resolved, _ = resolve(recipe, [f"{key}={value}" for key, value in keys.items()])
    accelerator, _ = start_accelerator(resolved)
    folder = claim_run_folder(resolved, accelerator)
    assert folder is not None
    built = Run(resolved, folder, accelerator, Console(quiet=True), StopRequest())
    built.build()
    batch = next(iter(built.loader))
    for _ in range(4):  # kernels are compiled, then layers recorded
        built.step(batch, stop=False).read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scalars = [built.step(batch, stop=False) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(bad for _, _, bad, _ in (s.read() for s in scalars))
    graphs = built.activations.graphs
    assert graphs is None or (graphs.recorded and not graphs.reason)


@pytest.mark.parametrize("policy", ["none", "full", "offload"])
@pytest.mark.parametrize("kind", ["full", "full_unclipped", "lora", "qlora"])
@pytest.mark.parametrize("packing", ["false", "true"])
def test_layers_from_graphs_keep_the_losses(kind, policy, packing, arguments, tmp_path):
    """A shape of the batches comes for the third time in the middle of an accumulation."""
    recipe, *fixed = KINDS[kind]
    fixed += [f"train.gradient_checkpointing={policy}", f"data.packing={packing}"]
    fixed += ["weights.product=bf16"] if kind == "qlora" else []  # what auto measures differs by graphs
    for name in ("true", "false"):
        run(recipe, arguments(*fixed, f"train.cuda_graphs={name}", "train.max_steps=12", output=name))
    mine, plain = ([r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("true", "false"))
    assert mine == pytest.approx(plain, rel=1e-3)
    graphs = read_report(tmp_path / "true")["activations"]["cuda_graphs"]
    assert "why_not" not in graphs and graphs["graphs"] > 0
    assert "cuda_graphs" not in read_report(tmp_path / "false")["activations"]


def test_layers_are_recorded_by_default(arguments, tmp_path):
    _, printed = run("lora", arguments("model.dtype=bf16", "train.max_steps=12"))
    graphs = read_report(tmp_path / "run")["activations"]["cuda_graphs"]
    assert "why_not" not in graphs and graphs["graphs"] > 0 and "Layers as CUDA graphs." in printed
    assert "cuda_graphs: true\n" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_where_graphs_do_not_fit_layers_are_not_recorded(arguments, tmp_path, monkeypatch):
    share = 0.5  # room for a context that is larger than the plan takes it to be
    monkeypatch.setattr("lowprec.plan.settle.FOR_GRAPHS", share)
    save_tiny(tmp_path / "wide", "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    wide = (f'model.model_name_or_path="{tmp_path / "wide"}"', "model.dtype=bf16")
    keys = dict(pair.split("=", 1) for pair in arguments(*wide, "train.cuda_graphs=true"))
    recipe = resolve("full", [f"{key}={value}" for key, value in keys.items()])[0]
    need = Planner(model_config(recipe.model), find_machine(None)[0]).predict(recipe).total / 2**30
    _, printed = run("full", arguments(*wide, f"profile.vram_limit_gib={0.99 * need / share}"))
    why = read_report(tmp_path / "run")["activations"]["cuda_graphs"]["why_not"]
    assert "more than 50%" in why and printed.count("No CUDA graphs: with them") == 1
    assert "cuda_graphs: false\n" in (tmp_path / "run" / "recipe.yaml").read_text()
    run("full", arguments(*wide, f"profile.vram_limit_gib={1.1 * need / share}", output="roomy"))
    assert "why_not" not in read_report(tmp_path / "roomy")["activations"]["cuda_graphs"]


def test_running_out_of_memory_says_what_held_it_and_what_to_change(arguments, tmp_path):
    save_tiny(tmp_path / "wide", "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=4)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / total)
    try:
        with pytest.raises(OutOfMemoryError) as error:
            run("full", arguments(f'model.model_name_or_path="{tmp_path / "wide"}"', "model.dtype=bf16"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    text = str(error.value)
    assert "optimizer states" in text and "weights" in text and "adapter=lora" in text
    assert read_report(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("policy", ["none", "full", "selective", "offload", "auto"])
@pytest.mark.parametrize("recipe", ["full", "qlora_nf4"])
def test_activation_policies_give_the_same_losses(recipe, policy, arguments, tmp_path):
    fixed = ("model.dtype=bf16", "train.cuda_graphs=false")  # with them rows are padded, but not for selective
    run(recipe, arguments(*fixed, f"train.gradient_checkpointing={policy}", output=policy))
    run(recipe, arguments(*fixed, "train.gradient_checkpointing=none", output="reference"))
    losses = [[r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in (policy, "reference")]
    assert losses[0] == losses[1]
    facts = read_report(tmp_path / policy)["activations"]
    assert facts["policy"] == ("none" if policy == "auto" else policy)  # a tiny model fits anywhere
    assert policy != "auto" or "predicted" in facts["why"]


def test_liger_kernels_run_and_keep_the_losses(arguments, tmp_path):
    for name in ("true", "false"):
        run("full", arguments("model.dtype=bf16", f"train.use_liger_kernel={name}", output=name))
    fused = read_report(tmp_path / "true")["wrap"]["fused"]
    assert all(not row["reason"] for row in fused) and {row["part"] for row in fused} == {"norm", "mlp", "rope", "loss"}
    mine, plain = ([r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("true", "false"))
    assert mine == pytest.approx(plain, rel=2e-2)


def test_packed_samples_keep_their_losses(arguments, tmp_path):
    """Flash attention of many lengths in bf16 beside SDPA of single samples."""
    for name in ("true", "false"):
        run(
            "full",
            arguments("model.dtype=bf16", f"data.packing={name}", "train.max_steps=1", "train.seed=1", output=name),
        )
    before = [read_report(tmp_path / name)["eval_loss_before"] for name in ("true", "false")]
    assert before[0] == pytest.approx(before[1], rel=5e-3)


def test_compiled_layers_keep_the_losses(arguments, tmp_path):
    for name in ("true", "false"):
        run("lora", arguments("model.dtype=bf16", f"train.torch_compile={name}", output=name))
    mine, plain = ([r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("true", "false"))
    assert mine == pytest.approx(plain, rel=2e-2)
    assert read_report(tmp_path / "true")["compile_s"] > 0
