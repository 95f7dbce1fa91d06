"""``train.offload_embeddings``: the same run with the table on the host; what is refused, and what is told."""

import gc
from types import SimpleNamespace

import pytest
import torch

from lowprec.config import resolve
from lowprec.errors import UserError
from lowprec.layers.host_embedding import host_tables, put_on_host, why_not_on_host
from lowprec.run_folder import read_metrics, read_report
from lowprec.testing import save_tiny, tiny_model
from lowprec.train import built, launch
from lowprec.train.out_of_memory import remedies
from tests.train.conftest import run

KEY = "train.offload_embeddings=true"


def figures(folder) -> tuple:
    """Losses of the steps, and held-out losses and sample answers."""
    report = read_report(folder)
    found = [report[f"{what}_{when}"] for what in ("eval_loss", "answers") for when in ("before", "after")]
    assert len(report["answers_after"]) == 1
    return [row["loss"] for row in read_metrics(folder) if "loss" in row], found


def test_on_a_processor_the_key_changes_nothing_and_says_so(arguments, tmp_path):
    run("lora", arguments(output="plain"))
    _, printed = run("lora", arguments(KEY, output="asked"))
    assert figures(tmp_path / "asked") == figures(tmp_path / "plain")
    assert printed.count("train.offload_embeddings=true moved nothing: there is nothing to offload") == 1
    assert any("nothing to offload" in note for note in read_report(tmp_path / "asked")["notes"])
    assert "offload_embeddings: true\n" in (tmp_path / "asked" / "recipe.yaml").read_text()


@pytest.mark.parametrize("recipe", ["lora", "qlora_nf4"])
def test_a_run_with_the_table_on_the_host_is_the_same_run(recipe, arguments, tmp_path, monkeypatch):
    """The loop as on a GPU, but for pinning. The run is then resumed without the key."""
    moved = []

    def keep(model, device):
        moved.append(put_on_host(model, pin=False))
        return f"{len(host_tables(model))} table stays on the host"

    monkeypatch.setattr(built, "keep_on_host", keep)
    for name, more in (("plain", ()), ("host", (KEY,))):
        _, printed = run(recipe, arguments("train.eval_steps=3", "train.save_steps=3", *more, output=name))
    assert moved == [None] and "1 table stays on the host" in printed
    assert figures(tmp_path / "host") == figures(tmp_path / "plain")
    counts = [read_report(tmp_path / name)["dtypes"] for name in ("host", "plain")]
    assert counts[0] == counts[1]
    again = f'train.resume_from_checkpoint="{tmp_path / "host" / "checkpoints" / "step-3"}"'
    _, printed = run(recipe, arguments("train.eval_steps=3", again, output="resumed"))
    assert figures(tmp_path / "resumed")[0] == figures(tmp_path / "plain")[0][3:]
    assert "offload_embeddings was" not in printed


def test_what_trains_all_weights_is_refused_before_anything_is_read():
    keys = ["model.model_name_or_path=some/model", "data.path=none"]
    assert resolve("lora", [*keys, KEY])[0].train.offload_embeddings
    with pytest.raises(UserError, match="offload_embeddings=true .* adapter=none .* adapter=lora"):
        resolve("full", [*keys, KEY])


@pytest.mark.parametrize(
    ("told", "more"), [("train.offload_embeddings=true", ()), ("state_store=ssd", ("state_store.path=states",))]
)
def test_several_processes_are_refused(told, more, arguments, monkeypatch):
    several = SimpleNamespace(num_processes=2, distributed_type=launch._SUPPORTED[-1])
    monkeypatch.setattr(launch, "Accelerator", lambda **keys: several)
    keys = dict(pair.split("=", 1) for pair in arguments(told, *more))
    recipe, _ = resolve("lora", [f"{key}={value}" for key, value in keys.items()])
    with pytest.raises(UserError, match=f"{told} is for one process, and there are 2"):
        launch.start_accelerator(recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["true", "false"])
@pytest.mark.parametrize("recipe", ["lora", "qlora_nf4"])
def test_on_a_gpu_losses_are_the_same_bits_and_memory_falls_by_the_table(recipe, graphs, arguments, tmp_path):
    save_tiny(tmp_path / "wide", "llama", hidden_size=512, vocab_size=65536, tie_word_embeddings=False)
    fixed = (f'model.model_name_or_path="{tmp_path / "wide"}"', "model.dtype=bf16", f"train.cuda_graphs={graphs}")
    peaks = []
    for name, more in (("plain", ()), ("host", (KEY,))):
        gc.collect()  # what a run before has left
        torch.cuda.reset_peak_memory_stats()
        _, printed = run(recipe, arguments(*fixed, *more, "train.max_steps=8", output=name))
        peaks.append(torch.cuda.max_memory_allocated())
    assert "(0.06 GiB) stay in pinned host memory" in printed
    assert figures(tmp_path / "host") == figures(tmp_path / "plain")
    plain, host = (read_report(tmp_path / name) for name in ("plain", "host"))
    assert peaks[0] - peaks[1] > 65536 * 512 * 2 - 2**21  # and what the runs before left to the first
    if graphs == "true":
        counted = [report["activations"]["cuda_graphs"]["graphs"] for report in (host, plain)]
        assert counted[0] == counted[1] > 0


@pytest.mark.gpu
def test_on_a_gpu_a_tied_table_stays_there_with_one_note(arguments, tmp_path):
    save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    _, printed = run("lora", arguments(f'model.model_name_or_path="{tmp_path / "tied"}"', "model.dtype=bf16", KEY))
    assert printed.count("moved nothing: the token embeddings are tied to the output head") == 1


def test_out_of_memory_offers_it_where_it_helps():
    recipe = resolve("lora", ["model.model_name_or_path=m", "data.path=none"])[0]
    assert KEY in remedies(recipe, can_offload=True) and KEY not in remedies(recipe)
    assert why_not_on_host(tiny_model("llama", tie_word_embeddings=True).requires_grad_(False)).startswith("are tied")
    untied = tiny_model("llama", tie_word_embeddings=False)
    assert why_not_on_host(untied) == "are trained" and why_not_on_host(untied.requires_grad_(False)) is None
