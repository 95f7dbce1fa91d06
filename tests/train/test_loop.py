"""Whole runs of tiny models, and the folders they leave."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowprec.checkpoint import damage
from lowprec.errors import UserError
from lowprec.plan.settle import Choice
from lowprec.run_folder import Status, read_metrics, read_report
from lowprec.testing import ARCHITECTURES, save_tiny
from tests.activations.rehearsal import Rehearsal
from tests.train.conftest import run

REPORT_FIELDS = {
    "status", "steps", "eval_loss_before", "eval_loss_after", "train_tokens", "tokens_per_second", "step_time_ms_p50",
    "peak_vram_gib", "peak_ram_gib", "layers", "versions", "hardware", "dtypes", "data", "footprint",
}  # fmt: skip


def test_full_run_leaves_a_folder_to_use(arguments, tmp_path, tiny):
    status, printed = run("full", arguments("train.eval_steps=3", "train.save_steps=2", "train.max_steps=7"))
    folder = tmp_path / "run"
    assert status is Status.FINISHED
    report = read_report(folder)
    assert report.keys() >= REPORT_FIELDS
    assert report["steps"] == 7 and report["eval_loss_after"] < report["eval_loss_before"]
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 8))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6, 7]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-6", "step-7"]
    assert damage(folder / "final") is None
    assert "held-out loss" in printed and "step 7/7" in printed

    assert json.loads((folder / "final" / "config.json").read_text()).get("use_cache", True)
    model = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    before = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say item 3."}, {"role": "assistant", "content": "green red"}],
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.no_grad():
        assert model(**text, labels=text["input_ids"]).loss < before(**text, labels=text["input_ids"]).loss


def test_lora_final_is_a_peft_adapter(arguments, tmp_path, tiny):
    run("lora", arguments("adapter.r=4"))
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "final")
    assert model.peft_config["default"].base_model_name_or_path == str(tiny / "model")
    assert any(tensor.abs().sum() > 0 for name, tensor in model.named_parameters() if "lora_B" in name)


def test_qlora_states_what_is_stored_how(arguments, tmp_path):
    run("qlora_nf4", arguments("model.dtype=bf16", "train.max_steps=2"))
    report = read_report(tmp_path / "run")
    assert report["layers"]["nf4"] == 14
    assert "uint8" in report["dtypes"]["parameters"] and report["dtypes"]["compute"] == "bfloat16"
    assert list(report["dtypes"]["trained_parameters"]) == ["float32"]


def test_bf16_is_stored_computed_and_mastered(arguments, tmp_path):
    run("full", arguments("model.dtype=bf16", "train.max_steps=2"))
    dtypes = read_report(tmp_path / "run")["dtypes"]
    assert list(dtypes["parameters"]) == ["bfloat16"] and dtypes["compute"] == "bfloat16"
    assert list(dtypes["optimizer_states"]) == ["float32"]
    saved = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains_and_saves(arch, arguments, tmp_path):
    save_tiny(tmp_path / "model", arch)
    model = f'model.model_name_or_path="{tmp_path / "model"}"'
    for recipe in ("full", "lora"):
        extra = ("train.gradient_checkpointing=true", "train.max_steps=2", "train.eval_max_samples=2")
        assert run(recipe, arguments(model, *extra, output=recipe))[0] is Status.FINISHED
        rows = [row["loss"] for row in read_metrics(tmp_path / recipe) if "loss" in row]
        assert len(rows) == 2 and all(4 < loss < 8 for loss in rows)  # ln 272 = 5.6
    AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "final")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "lora" / "final")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_learns(optimizer, arguments, tmp_path):
    run("full", arguments(f"optimizer={optimizer}", "train.max_steps=8"))
    report = read_report(tmp_path / "run")
    assert report["eval_loss_after"] < report["eval_loss_before"] - 0.3


def test_packing_trains_with_the_same_tokens(arguments, tmp_path):
    run("full", arguments("data.packing=true", "data.max_length=256", "train.max_steps=2"))
    assert len(read_metrics(tmp_path / "run")) == 4
    assert read_report(tmp_path / "run")["data"]["padding_share"] < 0.5


def test_activation_policies_change_no_number(arguments, tmp_path):
    """Nor does resuming under another policy."""
    policies = ("none", "full", "selective", "offload", "auto")
    losses = {}
    for policy in policies:
        run("full", arguments(f"train.gradient_checkpointing={policy}", "train.save_steps=3", output=policy))
        losses[policy] = [r["loss"] for r in read_metrics(tmp_path / policy) if "loss" in r]
        facts = read_report(tmp_path / policy)["activations"]
        assert facts["policy"] == (policy if policy != "auto" else "none") and facts["why"]
        assert ("kept" in facts) is (policy == "selective")
    assert all(losses[policy] == losses["none"] for policy in policies)
    again = f'train.resume_from_checkpoint="{tmp_path / "offload" / "checkpoints" / "step-3"}"'
    _, printed = run("full", arguments("train.gradient_checkpointing=selective", again, output="resumed"))
    assert [r["loss"] for r in read_metrics(tmp_path / "resumed") if "loss" in r] == losses["none"][3:]
    assert "gradient_checkpointing was" not in printed


def test_graphs_by_default_change_nothing_on_a_processor(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("lowprec.plan.settle.Planner", None)  # nothing is planned
    losses = {}
    for name, extra in (("auto", ()), ("false", ("train.cuda_graphs=false",))):
        _, printed = run("full", arguments(*extra, output=name))
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]
        assert "CUDA graphs" not in printed and "cuda_graphs" not in read_report(tmp_path / name)["activations"]
        assert "cuda_graphs: false\n" in (tmp_path / name / "recipe.yaml").read_text(), "as it was settled"
    assert losses["auto"] == losses["false"]
    paddings = [read_report(tmp_path / name)["data"]["padding_share"] for name in losses]
    assert paddings[0] == paddings[1]


def test_a_run_whose_layers_are_replayed_says_so(arguments, tmp_path, monkeypatch):
    """On the CPU, with a recorder that takes the recorded function again."""
    run("full", arguments("train.cuda_graphs=true", output="ordinary"))  # padded, and not recorded
    asked = []

    def settle_on(recipe, device, *, row_lengths, against_graphs):
        asked.append((*row_lengths(), against_graphs))
        return Choice("none", "of the test", True)

    monkeypatch.setattr("lowprec.train.built.settle_on", settle_on)
    monkeypatch.setattr("lowprec.plan.settle.why_no_graphs", lambda *args: None)
    monkeypatch.setattr("lowprec.activations.graphs.Recorder", Rehearsal)
    _, printed = run("full", arguments())
    ((plain, padded, against),) = asked
    assert 0 < plain < padded < plain + 12 and not against and "Layers as CUDA graphs." in printed
    assert read_report(tmp_path / "run")["activations"]["cuda_graphs"]["graphs"] > 0
    assert "cuda_graphs: true\n" in (tmp_path / "run" / "recipe.yaml").read_text()
    losses = [[r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("run", "ordinary")]
    assert losses[0] == losses[1]


def test_a_resumed_run_pads_as_the_checkpoint_was_padded(arguments, tmp_path):
    run("full", arguments("train.cuda_graphs=true", "train.save_steps=3", output="whole"))
    again = f'train.resume_from_checkpoint="{tmp_path / "whole" / "checkpoints" / "step-3"}"'
    _, printed = run("full", arguments(again, output="resumed"))
    assert "not that of one run" not in printed
    losses = [[r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r][-3:] for name in ("whole", "resumed")]
    assert losses[0] == losses[1]
    shares = [read_report(tmp_path / name)["data"]["padding_share"] for name in ("whole", "resumed")]
    assert shares[0] == shares[1]
    assert "cuda_graphs: true\n" in (tmp_path / "resumed" / "recipe.yaml").read_text()
    _, printed = run("full", arguments(again, "train.cuda_graphs=false", output="otherwise"))
    assert "train.cuda_graphs was True in the checkpoint and is False now: the rest is not that of one run" in printed


def test_the_report_lists_the_fused_parts(arguments, tmp_path):
    _, printed = run("lora", arguments("train.max_steps=1"))
    fused = read_report(tmp_path / "run")["wrap"]["fused"]
    assert {row["part"]: bool(row["reason"]) for row in fused} == {
        "norm": True,
        "mlp": True,
        "rope": True,
        "loss": False,
    }
    assert "Liger's kernels run on CUDA devices" in " ".join(printed.split())
    run("lora", arguments("train.max_steps=1", "train.use_liger_kernel=false", output="off"))
    reasons = {row["reason"] for row in read_report(tmp_path / "off")["wrap"]["fused"]}
    assert reasons == {"", "train.use_liger_kernel=false"}


def test_no_step_and_no_evaluation_holds_the_logits(arguments, tmp_path, monkeypatch):
    """The plain path's losses, although that path, which shifts the labels beside all logits, is never taken."""
    save_tiny(tmp_path / "model", "llama")
    model = f'model.model_name_or_path="{tmp_path / "model"}"'
    with monkeypatch.context() as patch:
        patch.setattr("lowprec.fused.surgery.put_loss", lambda model: "not in this test")
        run("full", arguments(model, output="plain"))

    def refuse(labels):
        raise AssertionError("the logits of all tokens were asked for")

    monkeypatch.setattr("lowprec.train.step.shifted", refuse)
    run("full", arguments(model, output="chunked"))
    plain, chunked = (
        [r.get("loss", r.get("eval_loss")) for r in read_metrics(tmp_path / name)] for name in ("plain", "chunked")
    )
    assert chunked == pytest.approx(plain, rel=1e-4)


def test_accumulation_does_not_change_the_loss(arguments, tmp_path):
    """4 x 1 is 1 x 4 to rounding, although the samples have different lengths."""
    shapes = {"4x1": (4, 1), "1x4": (1, 4), "2x2": (2, 2)}
    for name, (size, accumulation) in shapes.items():
        run("full", arguments(f"train.per_device_train_batch_size={size}",
                              f"train.gradient_accumulation_steps={accumulation}", output=name))  # fmt: skip
    rows = {name: [r for r in read_metrics(tmp_path / name) if "loss" in r] for name in shapes}
    for name in ("1x4", "2x2"):
        for mine, theirs in zip(rows[name], rows["4x1"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_metrics_of_the_report_come_from_the_run(arguments, tmp_path):
    run("full", arguments())
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    report = read_report(tmp_path / "run")
    assert report["train_tokens"] == rows[-1]["trained_tokens"] > 100
    assert min(r["step_time_ms"] for r in rows) <= report["step_time_ms_p50"] <= max(r["step_time_ms"] for r in rows)
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report


def test_a_second_run_into_the_same_folder_is_refused(arguments):
    run("full", arguments("train.max_steps=1"))
    with pytest.raises(UserError, match=r"train\.resume_from_checkpoint=auto"):
        run("full", arguments("train.max_steps=1"))


def test_epochs_give_the_number_of_steps(arguments, tmp_path):
    run("full", arguments("train.max_steps=null", "train.num_train_epochs=0.5"))
    assert read_report(tmp_path / "run")["steps"] == round(36 / 4 / 2)


def test_clipping_can_be_turned_off(arguments, tmp_path):
    for name, value in (("on", "0.01"), ("off", "null")):
        run("full", arguments(f"train.max_grad_norm={value}", output=name))
    on, off = ([r for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("on", "off"))
    assert on[0]["grad_norm"] == off[0]["grad_norm"]  # the norm before clipping
    assert on[-1]["loss"] != off[-1]["loss"]


def test_tensorboard_is_written_where_it_is_installed(arguments, tmp_path):
    pytest.importorskip("tensorboard")
    run("full", arguments("train.report_to=[auto]", "train.max_steps=2"))
    assert list((tmp_path / "run" / "lowprec").glob("events.out.tfevents.*"))


def test_an_unknown_tracker_is_named(arguments):
    with pytest.raises(UserError, match="no_such_tracker, which is no tracker.*tensorboard"):
        run("full", arguments("train.report_to=[no_such_tracker]"))


def test_streamed_data_train_and_resume(arguments, tmp_path, tiny):
    stream = ("data.streaming=true", "data.eval_samples=4", "train.max_steps=4", "train.save_steps=2")
    run("full", arguments(*stream, output="whole"))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-2"
    run("full", arguments(*stream, f'train.resume_from_checkpoint="{checkpoint}"', output="resumed"))
    whole, resumed = ([r["loss"] for r in read_metrics(tmp_path / n) if "loss" in r] for n in ("whole", "resumed"))
    assert whole[2:] == resumed


def test_a_mistake_in_the_data_leaves_the_folder_free_for_the_mended_command(arguments, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="line 1"):
        run("full", arguments(f'data.path="{bad}"'))
    assert run("full", arguments("train.max_steps=1"))[0] is Status.FINISHED
