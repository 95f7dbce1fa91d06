"""``lowprec.plan``: its JSON, what fits, what to change, and the states' sizes against the optimizer itself."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

import lowprec
from lowprec.cli import EXIT_DOES_NOT_FIT, main
from lowprec.config import resolve
from lowprec.errors import UserError
from lowprec.layers.nf4 import NF4
from lowprec.machine import named_card
from lowprec.optim import AdamW
from lowprec.plan import Planner, predict
from lowprec.plan.predict import GIB, PARTS, parse_gib
from lowprec.plan.run import find_machine, own_vram_gib
from lowprec.plan.schemes import without_data
from lowprec.plan.search import last_that_fits
from lowprec.plan.states import Trained, states_of
from lowprec.plan.step import TracedRecipe
from lowprec.testing import save_tiny, tiny_model

FIELDS = {
    "fits", "peak_allocated_gib", "peak_reserved_gib", "parts_gib", "peak_ram_gib", "disk_gib", "disk_gib_per_step",
    "step_time_ms", "tokens_per_second", "largest", "advice", "nearest_recipe",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config.json and no weights."""
    path = save_tiny(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=7)
    (path / "model.safetensors").unlink()
    return path


def planned(folder, name="full", *overrides, vram=0.45):
    small = ["data.max_length=64", "train.per_device_train_batch_size=4"]
    return lowprec.plan(name, [f"model.model_name_or_path={folder}", *small, *overrides], gpu="RTX 4060", vram=vram)


@pytest.fixture(scope="module")
def full(folder):
    return planned(folder)


@pytest.fixture(scope="module")
def too_large(folder, full):
    return planned(folder, vram=(full.prediction.total - 2**20) / GIB)


def test_parts_sum_to_the_peak_and_all_fields_are_there(full):
    answer = json.loads(json.dumps(full.to_dict()))
    assert answer.keys() >= FIELDS
    parts = answer["parts_gib"]
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(answer["peak_gib"])
    assert answer["peak_reserved_gib"] == pytest.approx(answer["peak_gib"] - parts["context"])
    assert answer["peak_allocated_gib"] == pytest.approx(answer["peak_reserved_gib"] - parts["slack"])
    assert answer["fits"] is True and answer["advice"] == []
    parameters = sum(p.numel() for p in tiny_model("llama", num_hidden_layers=7).parameters())
    assert parts["weights"] * GIB == pytest.approx(2 * parameters, rel=0.1)
    assert parts["optimizer"] * GIB == pytest.approx(12 * parameters, rel=0.1)  # master and two moments in fp32
    assert answer["step_time_ms"] > 0 and answer["tokens_per_second"] > 0


def test_the_largest_batch_fits_and_a_larger_one_does_not(full):
    rows, length = full.largest
    assert length == 64 and 4 <= rows < 512
    planner = Planner(tiny_model("llama", num_hidden_layers=7).config, full.machine)
    # Allocated memory rises along a line; what is reserved comes in pages of 20 MiB.
    need = [planner.predict(full.recipe, count, length).total for count in (rows, rows + 3)]
    assert need[0] <= 0.45 * GIB + 20 * 2**20 and need[1] > 0.45 * GIB


def test_what_does_not_fit_gets_advice_and_another_recipe(folder, full, too_large):
    now, answer = full.prediction, too_large
    assert answer.fits is False
    saved = [change.saves_gib for change in answer.advice]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0
    best = answer.advice[0]
    changed, _ = resolve("full", [f"model.model_name_or_path={folder}", "data.path=x", "data.max_length=64",
                                  "train.per_device_train_batch_size=4", f"{best.key}={best.value}",
                                  *([best.also] if best.also else [])])  # fmt: skip
    planner = Planner(tiny_model("llama", num_hidden_layers=7).config, full.machine)
    assert (now.total - planner.predict(changed).total) / GIB == pytest.approx(best.saves_gib, abs=1e-6)
    assert answer.nearest_recipe is not None and answer.nearest_recipe != "full"
    console = Console(width=120, record=True, file=io.StringIO())
    answer.render(console)
    text = console.export_text()
    assert "does not fit" in text and f"{best.key}={best.value}" in text
    kwh = answer.to_dict()["footprint_per_step"]["energy_kwh"]
    assert f"1,000 steps take {1e3 * kwh:.3g} kWh" in text and "kg CO2e (train.grid_g_co2e_per_kwh=473)" in text


def test_a_recipe_that_fits_one_row_at_a_time_alone_is_named_with_its_keys(folder):
    long = "data.max_length=1024"
    one_row = planned(folder, "lora", long, "train.per_device_train_batch_size=1").prediction.total
    answer = planned(folder, "full", long, "train.gradient_accumulation_steps=3", vram=one_row / GIB).to_dict()
    assert answer["fits"] is False and answer["nearest_recipe"] == "lora"
    assert answer["nearest_recipe_also"] == [
        "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=12"
    ]  # fmt: skip


def test_frozen_experts_count_in_8_bits_where_the_card_multiplies_them_so(tmp_path):
    inner, hidden, experts, depth = 32, 64, 8, 7
    shape = {"hidden_size": hidden, "num_hidden_layers": depth, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "mixtral", vocab_size=272, intermediate_size=inner, num_local_experts=experts, **shape
    )
    keys = ["data.path=x", "data.max_length=64", "adapter.target_modules=[q_proj,v_proj]", "weights=fp8"]
    recipe, _ = resolve("lora", [f"model.model_name_or_path={tmp_path}", *keys])
    found = {card: Planner(config, named_card(card)).predict(recipe) for card in ("H100", "RTX 4090")}
    weights = 3 * inner * hidden * experts * depth
    saved = found["RTX 4090"].peak.parts["weights"] - found["H100"].peak.parts["weights"]
    assert 0.6 * weights < saved < weights  # 2 bytes each, or 1 and the scales of short rows
    assert found["H100"].schemes["fp8"] == found["RTX 4090"].schemes["fp8"] + 2 * depth


def test_what_changes_no_step_is_traced_once(folder, monkeypatch):
    made = []
    monkeypatch.setattr(predict, "TracedRecipe", lambda *args: made.append(1) or TracedRecipe(*args))
    planner = Planner(tiny_model("llama", num_hidden_layers=7).config, named_card("RTX 4060"))
    same = [f"model.model_name_or_path={folder}", "data.path=x", "data.max_length=64"]

    def of(*overrides):
        return planner.predict(resolve("lora", [*same, *overrides])[0])

    first, more = of(), of("train.gradient_accumulation_steps=16", "optimizer.learning_rate=1e-3", "train.save_steps=7")
    assert len(made) == 1 and first.total == more.total
    assert more.time.total_ms == pytest.approx(2 * first.time.total_ms, rel=0.2)  # 16 micro-batches instead of 8
    of("train.gradient_accumulation_steps=1", "train.max_grad_norm=0.5"), of("adapter.r=8")
    assert len(made) == 3


def test_one_step_is_traced_for_all_states_of_an_optimizer(folder, monkeypatch):
    traced = []
    whole = TracedRecipe._trace
    monkeypatch.setattr(TracedRecipe, "_trace", lambda self, *size: traced.append(size) or whole(self, *size))
    planner = Planner(tiny_model("llama", num_hidden_layers=7).config, named_card("RTX 4060"))
    same = [f"model.model_name_or_path={folder}", "data.path=x", "data.max_length=64"]
    others = [], ["optimizer.state_dtype=int8"], ["optimizer.master=split"], ["state_store=cpu"]
    recipes = [resolve("full", [*same, *keys])[0] for keys in others]
    found = [planner.predict(recipe).peak for recipe in recipes]
    assert len(traced) == 1 and len({peak.parts["optimizer"] for peak in found}) == len(others)
    alone = [Planner(planner.config, planner.machine).predict(recipe).peak for recipe in recipes]
    assert found == alone and len(traced) == 5


def test_without_a_card_there_are_no_times(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    answer = lowprec.plan("lora", [f"model.model_name_or_path={folder}"]).to_dict()
    assert answer["step_time_ms"] is None and answer["fits"] is None
    assert any("--gpu" in note for note in answer["notes"])


def test_what_is_not_predicted_is_said(folder):
    answer = planned(folder, "lora", "train.torch_compile=true", "train.gradient_checkpointing=none").to_dict()
    assert any("torch_compile=true is predicted as if it were false" in note for note in answer["notes"])


def test_buffers_of_a_deep_models_states_are_as_large_as_its_store_makes_them(folder):
    """The trace has five of its layers, whose states alone would be cut smaller."""
    recipe, _ = resolve("full", [f"model.model_name_or_path={folder}", "data.path=some", "state_store=cpu"])
    config = tiny_model("llama").config
    config.num_hidden_layers = 400
    found = Planner(config, named_card("H100")).predict(recipe)
    assert found.peak.parts["optimizer"] == sum(nbytes for _, nbytes in found.states.device) > 4 * 2**20


def test_schemes_that_measure_are_predicted(folder):
    answer = planned(folder, "lora", "weights=auto").to_dict()
    assert sum(answer["layers"].values()) == 7 * 7 + 1
    assert any("chooses by predicted times" in note for note in answer["notes"])


@pytest.mark.parametrize(
    "name,sm_count,known",
    [
        ("NVIDIA H100 80GB HBM3", 132, "H100"), ("NVIDIA H100 PCIe", 114, None), ("NVIDIA L40S", 142, None),
        ("NVIDIA GeForce RTX 4060 Ti", 34, None), ("NVIDIA A100-SXM4-40GB", 108, "A100"),
    ],
)  # fmt: skip
def test_a_card_that_was_never_measured_has_its_own_memory(name, sm_count, known, folder, monkeypatch):
    device = SimpleNamespace(name=name, multi_processor_count=sm_count, total_memory=39 * 2**30)
    monkeypatch.setattr("lowprec.plan.run.this_machine", lambda: None)
    for asked, answer in (("is_available", True), ("current_device", 0), ("get_device_properties", device)):
        monkeypatch.setattr(torch.cuda, asked, lambda *index, answer=answer: answer)
    found, notes = find_machine(None)
    assert (found.name if found else None) == known and "lowprec doctor --measure" in notes[0]
    assert found is None or found.vram_gib == 39.0
    if found is None:
        assert own_vram_gib() == 39.0


def test_nf4_products_are_chosen_by_predicted_times_and_noise():
    linear = torch.nn.Linear(4096, 14336, device="meta")

    def chosen(host_us=10.0, in_graphs=False, **options):
        scheme = without_data(NF4(**options), replace(named_card("H100"), host_us=host_us))
        ((found, why),) = scheme.choose(None, {"up": (linear, True)}, None, None, in_graphs).values()
        return found.product

    assert chosen() == "int8", "e4m3 is under the bound of 30 dB"
    assert chosen(min_sqnr_db=20.0) == "fp8"
    assert chosen(min_sqnr_db=40.0) == "bf16"
    assert NF4().chooses and not NF4(product="bf16").chooses
    assert chosen(host_us=1000.0) == "bf16", "fewer launches"
    assert chosen(host_us=1000.0, in_graphs=True) == "int8"


def test_the_command_answers_in_json_and_by_its_exit_code(too_large, capsys, monkeypatch):
    asked = {}

    def stand_in(*args, **keywords):
        asked.update(keywords, args=args)
        return too_large

    monkeypatch.setattr("lowprec.plan.plan", stand_in)
    arguments = ["plan", "full", "train.seed=1", "--gpu", "RTX 4060", "--vram", "1GiB"]
    assert main([*arguments, "--json"]) == EXIT_DOES_NOT_FIT
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert asked == {"args": ("full", ["train.seed=1"]), "gpu": "RTX 4060", "vram": "1GiB"}
    assert main(arguments) == EXIT_DOES_NOT_FIT
    assert "Change first" in capsys.readouterr().out


def test_a_mistake_is_one_paragraph(folder, capsys):
    assert main(["plan", "lora", f"model.model_name_or_path={folder}", "--gpu", "RTX 1"]) == 1
    assert "RTX 4060" in capsys.readouterr().err
    assert main(["plan", "lora", f"model.model_name_or_path={folder}/none"]) == 1
    assert "there is no such folder" in " ".join(capsys.readouterr().err.split())


def test_amounts_of_memory_are_read_with_their_units():
    assert [parse_gib(text) for text in ("8GiB", "8G", "8", "512MiB")] == [8, 8, 8, 0.5]
    assert parse_gib("8GB") == pytest.approx(8e9 / 2**30)
    with pytest.raises(UserError, match="8GiB"):
        parse_gib("-1GiB")
    with pytest.raises(UserError, match="--vram inf is no amount"):
        parse_gib("inf")


@pytest.mark.parametrize("limit", [0, 1, 37, 102, 160, 161, 481, 5000])
def test_the_search_ends_at_the_last_that_fits(limit):
    asked: list[int] = []

    def need(count: int) -> int:
        asked.append(count)
        return 10 * count + (count // 7) * 3  # almost a line

    expected = max((count for count in range(1, 513) if 10 * count + (count // 7) * 3 <= limit), default=0)
    found = last_that_fits(need, limit, 4, 512, believed=16)
    assert found == (expected if expected <= 16 else pytest.approx(expected, rel=0.03))
    assert len(asked) <= 8 and max(asked) <= 17


@pytest.mark.parametrize(
    "options", [[], ["optimizer.state_dtype=int8", "optimizer.master=split"], ["optimizer.state_dtype=bf16"]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_as_large_as_the_optimizer_makes_them(options, dtype):
    recipe, _ = resolve("full", ["model.model_name_or_path=x/y", "data.path=x", *options])
    model = tiny_model("llama", dtype=dtype)
    trained = [Trained(name, p.numel(), p.dtype) for name, p in model.named_parameters()]
    names = {"state_dtype": recipe.optimizer.state_dtype, "master": recipe.optimizer.master}
    optimizer = AdamW(model.named_parameters(), **names)
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64)).loss.backward()
    optimizer.step()
    real = sorted(buffer.nbytes for buffer in optimizer._store._buffers.values())
    assert sorted(nbytes for _, nbytes in states_of(recipe, trained).device) == real


@pytest.mark.parametrize("name", ["lora", "qlora_nf4"])
def test_embeddings_on_the_host_count_there(folder, name, monkeypatch):
    monkeypatch.setattr(predict.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0)))
    config = tiny_model("llama", num_hidden_layers=7, vocab_size=4096).config
    keys = [f"model.model_name_or_path={folder}", "data.path=x", "data.max_length=64"]
    table = 4096 * 64 * 2

    def of(config, *more):
        return Planner(config, named_card("RTX 4060")).predict(resolve(name, [*keys, *more])[0])

    before, after = of(config), of(config, "train.offload_embeddings=true")
    assert before.peak.parts["weights"] - after.peak.parts["weights"] == table
    assert before.peak.allocated - after.peak.allocated == table == after.ram - before.ram
    others = [{kind: size for kind, size in p.peak.parts.items() if kind != "weights"} for p in (before, after)]
    assert others[0] == others[1] and sum(after.parts.values()) == after.total
    assert after.time.link_ms > before.time.link_ms
    config.tie_word_embeddings = True
    tied = of(config), of(config, "train.offload_embeddings=true")
    assert tied[0].peak == tied[1].peak and tied[0].ram == tied[1].ram


def test_embeddings_on_the_host_are_advised_where_that_saves_memory(folder):
    small = ["data.path=x", "data.max_length=64", f"model.model_name_or_path={folder}"]
    for tied in (False, True):
        config = tiny_model("llama", num_hidden_layers=7, vocab_size=2**18, tie_word_embeddings=tied).config
        answer = lowprec.plan("lora", small, gpu="RTX 4060", vram=0.2, config=config)
        saved = {change.key: change.saves_gib for change in answer.advice}
        assert ("train.offload_embeddings" in saved) is not tied
        assert tied or saved["train.offload_embeddings"] == pytest.approx(2**18 * 64 * 2 / GIB, abs=0.02)


def test_staging_buffers_are_as_large_as_the_store_makes_them():
    """Few states are cut into smaller chunks, since the GPU holds four."""
    overrides = ["model.model_name_or_path=x/y", "data.path=x", "state_store=cpu"]
    recipe, _ = resolve("lora", overrides)
    for numel, chunk in ((1000, 8192), (2**20, 2**20), (2**24, 2**21), (2**30, 2**25)):
        states = states_of(recipe, [Trained("w", numel, torch.float32)])
        assert states.device == [("", chunk)] * 4
    model = tiny_model("llama")
    optimizer = AdamW(model.named_parameters(), state_store="cpu")
    trained = [Trained(name, p.numel(), p.dtype) for name, p in model.named_parameters()]
    assert states_of(recipe, trained).device[0][1] == max(chunk.nbytes for chunk in optimizer._store.chunks)
    optimizer.close()


def test_states_on_a_disk_are_as_large_as_its_files(tmp_path):
    overrides = ["model.model_name_or_path=x/y", "data.path=x", "state_store=ssd", f"state_store.path={tmp_path}"]
    recipe, _ = resolve("full", [*overrides, "state_store.reserve_checkpoints=0", "state_store.pinned_gib=0.05"])
    model = tiny_model("llama")
    trained = [Trained(name, p.numel(), p.dtype) for name, p in model.named_parameters()]
    states = states_of(recipe, trained)
    arguments = recipe.state_store.arguments()
    optimizer = AdamW(model.named_parameters(), **arguments)
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64)).loss.backward()
    optimizer.step()
    optimizer.flush()
    assert sum(file.stat().st_size for file in tmp_path.glob("*.bin")) == states.disk
    assert optimizer._store.traffic.bytes_written == states.step_written
    optimizer.close()


def test_windows_shorter_than_the_samples_make_another_trace(folder):
    config = tiny_model("llama", num_hidden_layers=7).config
    config.sliding_window = 256
    planner = Planner(config, named_card("RTX 4060"))

    def key(length):
        keys = [f"model.model_name_or_path={folder}", "data.path=x", f"data.max_length={length}"]
        return planner.key(resolve("lora", keys)[0])

    assert key(64) == key(128) != key(512) == key(1024)
