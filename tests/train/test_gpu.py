"""What only a CUDA device can show: no waiting inside a step, exact resume, running out of memory, 4-bit bases."""

import pytest
import torch
from rich.console import Console

from lowprec.config import resolve
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
    "fp16_lora": ("lora", "model.dtype=fp16"),
}  # fmt: skip


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


@pytest.mark.parametrize("recipe", ["full", "lora", "qlora_nf4"])
def test_a_step_never_waits_for_the_device(recipe, arguments, tmp_path):
    resolved, _ = resolve(recipe, [a for a in arguments("model.dtype=bf16") if a != "model.dtype=fp32"])
    accelerator, _ = start_accelerator(resolved)
    folder = claim_run_folder(resolved, accelerator)
    assert folder is not None
    built = Run(resolved, folder, accelerator, Console(quiet=True), StopRequest())
    built.build()
    batches = [batch for batch, _ in zip(built.loader, range(6), strict=False)]
    for batch in batches[:3]:
        built.step(batch, stop=False).read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scalars = [built.step(batch, stop=False) for batch in batches[3:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(bad for _, _, bad, _ in (s.read() for s in scalars))


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
