"""``lowprec bench train``: which runs are due, how they are kept, and tiny ones for real."""

import json
import subprocess
from dataclasses import fields, replace

import pytest
import torch
from accelerate.state import AcceleratorState

from lowprec.bench import processes
from lowprec.bench.train import host, limit, ours, peers, run
from lowprec.bench.train.limit import Layer
from lowprec.bench.train.run import bench_train
from lowprec.bench.train.table import markdown
from lowprec.bench.train.works import LLAMA_8B, TABLE, all_works
from lowprec.cli import main
from lowprec.errors import UserError
from lowprec.machine import Machine

OK = {"status": "ok", "step_ms_p50": 100.0, "step_ms_p20": 99.0, "step_ms_p80": 103.0, "tokens_per_second": 2000.0,
      "peak_gb": 5.0, "reserved_gb": 6.0, "last_loss": 1.0}  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    """Stands in for the processes: work and peer -> figures; notes what was run."""
    ran, answers = [], {}

    def one(work, peer, folder, left):
        ran.append((work.name, peer))
        return answers.get((work.name, peer), OK), 1.0

    monkeypatch.setattr(run, "_one", one)
    monkeypatch.setattr(run, "machine_has_gpu", lambda: False)
    monkeypatch.setattr(run, "_check_machine", lambda works: None)
    return ran, answers


def test_results_are_kept_and_not_repeated(tmp_path, fake):
    ran, answers = fake
    answers["qlora_8b", "transformers"] = OK | {"tokens_per_second": 800.0}
    said = []
    text = bench_train(["qlora_8b"], ["transformers"], folder=tmp_path, say=said.append)
    assert ran == [("qlora_8b", "lowprec"), ("qlora_8b", "transformers")]
    assert (tmp_path / "bench_train.png").stat().st_size > 5000
    assert "2.50x" in text and (tmp_path / "bench_train.md").read_text() == text
    row = json.loads((tmp_path / "bench_train.jsonl").read_text().splitlines()[0])
    assert {"gpu", "versions", "when", "seconds", "tokens_per_second"} <= row.keys() and row["versions"]["torch"]
    with (tmp_path / "bench_train.jsonl").open("a") as file:
        file.write('{"cut off')
    bench_train(["qlora_8b"], ["transformers"], folder=tmp_path, say=said.append)
    assert len(ran) == 2
    bench_train(["qlora_8b"], folder=tmp_path, again=True, say=said.append)
    assert len(ran) == 3


def test_the_first_variant_that_fails_ends_its_family(tmp_path, fake):
    ran, answers = fake
    answers["longest_8b@40960", "lowprec"] = {"status": "out of memory", "error": "no"}
    text = bench_train(["longest_8b"], folder=tmp_path, say=lambda _: None)
    assert [name for name, _ in ran] == ["longest_8b@16384", "longest_8b@32768", "longest_8b@40960"]
    assert "out of memory" in text
    bench_train(["longest_8b"], folder=tmp_path, say=lambda _: None)
    assert len(ran) == 3


def test_time_that_is_up_leaves_the_rest_for_the_next_call(tmp_path, fake):
    ran, answers = fake
    answers["qlora_8b", "lowprec"] = {"status": "time is up"}
    said = []
    bench_train(["qlora_8b"], folder=tmp_path, minutes=9, say=said.append)
    assert "starts again" in said[-1] and not (tmp_path / "bench_train.jsonl").exists()
    bench_train(["qlora_8b"], folder=tmp_path, minutes=0.1, say=said.append)
    assert len(ran) == 1 and "goes on from here" in said[-1]


def test_names_are_checked_before_anything_runs(tmp_path, fake):
    with pytest.raises(UserError, match="qlora_9b is no work.*qlora_8b"):
        bench_train(["qlora_9b"], folder=tmp_path)
    with pytest.raises(UserError, match="axolotl is not known"):
        bench_train(["qlora_8b"], ["axolotl"], folder=tmp_path)
    with pytest.raises(UserError, match="unsloth is not installed"):
        bench_train(["qlora_8b"], ["unsloth"], folder=tmp_path)
    assert not fake[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said_at_once(tmp_path):
    with pytest.raises(UserError, match="has none.*tiny_qlora"):
        bench_train(["tiny_full", "qlora_8b"], folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_works_of_the_table(tmp_path):
    works = all_works()
    assert {work.family for work in works.values()} >= set(TABLE)
    assert [work.name for work in run.select(["grid"])] == [name for name in works if name.startswith("grid_")]
    assert {work.family for work in run.select(None)} == set(TABLE)
    loops: dict[str, set] = {}
    for work in run.select(["eight_bit"]):
        assert ours.recipe_of(work, tmp_path, torch.device("cpu")).choice("weights") == work.name.split("_", 3)[3]
        others = tuple(o for o in work.overrides if not o.startswith("weights"))
        loops.setdefault(work.name.split("_")[2], set()).add((work.recipe, work.tokens, others))
    assert {size: len(each) for size, each in loops.items()} == {"8b": 1, "1b": 1}  # they differ in weights alone
    unlike = {(work.recipe, *(o for o in work.overrides if "tokens" not in o)): work for work in works.values()}
    for work in unlike.values():
        assert ours.recipe_of(work, tmp_path, torch.device("cpu")).name == work.recipe  # composes
    lengths = {o for w in run.select(["longest_8b"]) for o in w.overrides if o.startswith("weights.tokens")}
    assert lengths == {"weights.tokens=4096"}  # what is measured for one length serves all
    caps = {w.cap_gib: ours.recipe_of(w, tmp_path, torch.device("cpu")).train for w in run.select(["qlora_8b_capped"])}
    assert list(caps) == sorted(caps, reverse=True) and min(caps) == 5.0  # the first that fails ends the family
    assert [cap for cap, train in caps.items() if not train.offload_embeddings] == [8.0, 7.0]
    assert [w.name for w in run.select(["qlora_8b"])] == ["qlora_8b"]  # and not qlora_8b_1x2048


def test_a_tiny_work_runs_for_real_from_the_command_line(tmp_path, capsys):
    assert main(["bench", "train", "--works", "tiny_qlora", "--path", str(tmp_path)]) == 0
    row = json.loads((tmp_path / "bench_train.jsonl").read_text().splitlines()[0])
    assert row["status"] == "ok" and row["peer"] == "lowprec" and row["step_ms_p50"] > 0, row
    assert row["layers"] == {"nf4": 14, "bf16": 1} and "14 of 14 LoRA layers fused" in row["lora"]
    assert row["kernel_ms"]["products"] > 0
    assert "tries this benchmark out" in (out := capsys.readouterr().out) and "tiny_qlora, ms: products" in out


@pytest.fixture
def no_accelerator_left():
    """Accelerate keeps its first precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("work", ["tiny_qlora", "tiny_full"])
def test_tiny_works_by_lowprec_and_by_a_peer(tmp_path, work, monkeypatch, no_accelerator_left):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = all_works()[work]
    for figures in (ours.run(work, tmp_path, device), peers.run("transformers", work, tmp_path, device)):
        assert 3 < figures["last_loss"] < 8 and figures["step_ms_p20"] <= figures["step_ms_p80"]
        assert figures["tokens_per_second"] == pytest.approx(64e3 / figures["step_ms_p50"], rel=1e-2)


@pytest.mark.parametrize(("work", "learning_rate"), [("tiny_qlora", 2e-4), ("tiny_full", 2e-5)])
def test_peers_train_at_the_learning_rate_of_the_recipe(tmp_path, work, learning_rate, monkeypatch):
    seen = []
    build = peers._optimizer
    monkeypatch.setattr(peers, "_optimizer", lambda *arguments: seen.append(build(*arguments)) or seen[-1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peers.run("transformers", replace(all_works()[work], warmup=0, timed=1), tmp_path, device)
    assert seen[0].param_groups[0]["lr"] == learning_rate


def test_a_peer_that_changes_transformers_comes_before_it(tmp_path):
    """unsloth warns that it is slower otherwise, which would flatter everyone else."""
    site = tmp_path / "site"
    (site / "unsloth").mkdir(parents=True)
    code = "import sys\nraise SystemExit('late' if {'transformers', 'peft', 'trl'} & set(sys.modules) else 'early')"
    (site / "unsloth" / "__init__.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWPREC_PEER_PATH_UNSLOTH", str(site))
        figures, _ = run._one(all_works()["qlora_8b"], "unsloth", tmp_path, 120)
    assert figures["error"] == "early"


def test_the_versions_of_a_row_are_those_that_its_process_saw(tmp_path):
    info = tmp_path / "unsloth-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unsloth\nVersion: 1.2.3")
    assert processes.versions([str(tmp_path)])["unsloth"] == "1.2.3" and processes.versions([str(tmp_path)])["torch"]
    assert "unsloth" not in processes.versions([])


def test_a_process_that_dies_is_a_failed_row(tmp_path, monkeypatch):
    real = subprocess.run

    def broken(command, **keywords):
        return real([command[0], "-c", "raise SystemExit('no such thing')"], **keywords)

    monkeypatch.setattr(processes.subprocess, "run", broken)
    text = bench_train(["tiny_full"], folder=tmp_path, say=lambda _: None)
    assert "failed" in text and "no such thing" in text and list(tmp_path.glob("*.log"))


def test_the_limit_adds_up(monkeypatch):
    """With every product at 1000 TFLOP/s and 3 TB/s the sum is what the shapes say."""
    rate = 1e12
    monkeypatch.setattr(limit, "fastest_product", lambda m, n, k, clock: (2 * m * n * k / rate, "int8"))
    monkeypatch.setattr(limit, "_bf16", lambda m, n, k, clock: 2 * m * n * k / rate)
    monkeypatch.setattr(limit, "_attention", lambda work, layer, forwards, clock: 0.25)
    work = all_works()["qlora_8b"]
    found = limit.limit(work, bandwidth_gb_per_s=3000.0)
    weights = 32 * Layer.of(LLAMA_8B).weights
    assert weights == 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336)
    step = found["step_ms"]
    down = 32 * 4096 * 14336  # its product is not computed again
    assert step["products"] == pytest.approx((3 * weights - down) * 2 * 4096 / rate, rel=1e-4)
    assert step["head"] == pytest.approx(2 * 2 * 4096 * 128256 * 4096 / rate, rel=1e-4)
    assert step["attention"] == 8.0 and step["decode"] == pytest.approx((3 * weights - down) * 1.516 / 3e9, rel=1e-2)
    assert found["tokens_per_second"] == pytest.approx(4096e3 / sum(step.values()), rel=1e-3)
    full = limit.limit(all_works()["full_1b"], bandwidth_gb_per_s=3000.0)["step_ms"]
    assert "optimizer" in full and "decode" not in full and "adapter" not in full


def test_a_table_without_rows_says_so():
    assert markdown([]) == "No results yet.\n"


@pytest.mark.gpu
def test_the_limit_is_measured_on_a_gpu():
    found = limit.limit(all_works()["tiny_qlora"])
    assert found["tokens_per_second"] > 0 and found["rates"] and torch.cuda.is_available()


@pytest.mark.parametrize("recorded", [True, False])
def test_the_hosts_times_are_told_apart(recorded, monkeypatch):
    """The lesser time of each work counts; an operator takes 50 us, one of lowprec's 200, a replay 300."""
    us = {"host": 50 * 100, "host, 8-bit": 50 * 100 + 200 * 40, "host, replayed": 5000 + 300 * 16,
          "host, deeper": 5000 + 300 * 48}  # fmt: skip
    runs = []

    def fake(work, folder, device, closely):
        runs.append(work.name)
        graphs = 2 * work.shape["num_hidden_layers"] if recorded else 0
        slow = 3 if runs.count(work.name) == 1 else 1
        return {"host_ms_p50": slow * us[work.name] / 1e3, "activations": {"cuda_graphs": {"graphs": graphs}}}

    monkeypatch.setattr(host, "run", fake)
    monkeypatch.setattr(host, "no_triton", lambda device: None)
    monkeypatch.setattr(host, "_calls", lambda work, device: (140, 40) if work is host.OWN else (100, 0))
    found = host.host_times(torch.device("cuda"))
    assert found["host_us"] == pytest.approx(50) and found["own_host_us"] == pytest.approx(200)
    assert found["replay_us"] == (pytest.approx(300) if recorded else None)
    assert sorted(runs) == sorted([*us] * 2)
    monkeypatch.setattr(host, "no_triton", lambda device: "it is too old")
    assert host.host_times(torch.device("cuda"))["own_host_us"] is None


def test_the_host_is_timed_by_steps_that_it_launches(no_accelerator_left):
    found = host.host_times(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert 1 < found["host_us"] <= found["own_host_us"] < 10_000, "microseconds for an operator"
    assert (found["replay_us"] is not None) == torch.cuda.is_available()
    assert found.keys() <= {field.name for field in fields(Machine)}
