"""bench ssd --works: a tiny work goes through its own process, and the tables say what follows from the figures."""

import json

import pytest

from lowprec.bench.raw_disk import Settling
from lowprec.bench.ssd_training import bench_ssd_training
from lowprec.bench.ssd_training.process import host_gb, host_peak_gb
from lowprec.bench.ssd_training.raw import RawMeasurement
from lowprec.bench.ssd_training.table import facts, markdown
from lowprec.bench.ssd_training.works import KNOWN
from lowprec.errors import UserError

BEFORE = {"mixed_gb_s": 1.8, "settled": True, "probes_gb_s": [1.8, 1.9, 1.8]}
AFTER = {"mixed_gb_s": 2.2, "settled": True, "probes_gb_s": [1.0, 2.2, 2.1, 2.2]}
RAW = {"block_mib": 8.0, "threads": 2, "direct": True, "before": BEFORE, "after": AFTER}
SHORT = RawMeasurement(seconds=0.4, file_gib=0.125)
STEP = {"read_gb": 4.0, "written_gb": 4.2, "forward_s": 0.1, "backward_s": 4.2, "update_s": 0.1, "loss": 9.0}


def made_up(by, step_s, **more):
    steps = [STEP | {"step_s": 9.9, "read_gb": 0.0}] + [STEP | {"step_s": s} for s in step_s]
    row = {"work": "int8", "by": by, "gpu": "some GPU", "status": "ok", "versions": {"torch": "2"}, "raw": RAW}
    return row | {"step_s_p50": sorted(step_s)[1], "steps": steps, "peak_gb": 19.7} | more


def test_a_work_runs_and_is_not_repeated(tmp_path):
    said = []
    table = bench_ssd_training(["tiny"], path=tmp_path, raw=SHORT, say=said.append)
    (row,) = (json.loads(line) for line in (tmp_path / "bench_ssd.jsonl").read_text().splitlines())
    assert row["status"] == "ok" and all(row["raw"][when]["mixed_gb_s"] > 0 for when in ("before", "after"))
    assert "| tiny | lowprec |" in table
    first, *later = row["steps"]
    assert len(later) == 2 and all(step["loss"] < first["loss"] for step in later)
    assert row["statistics"]["written_gb"] >= 3 * row["statistics"]["states_gib"]
    assert {"waited_s", "forward_s", "backward_s", "update_s"} <= later[0].keys()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"bench_ssd.jsonl", "bench_ssd.md"}, "no states stay behind"
    assert bench_ssd_training(["tiny"], path=tmp_path, raw=SHORT, say=said.append) == table
    assert said[0] == "tiny: lowprec ..." and len(said) == 2


def test_what_follows_from_the_figures():
    row = made_up("lowprec", [4.0, 5.0, 4.5], compute_s=0.5, weights_and_activations_gb=19.5, host_growth_gb=2.1)
    found = facts(row)
    assert found["disk_s"] == pytest.approx(4.1) and found["gb_s"] == pytest.approx(8.2 / 4.5)
    shares = {"before": 1.8, "after": 2.2, "mean": 2.0}
    assert all(found[f"of_{name}"] == pytest.approx(8.2 / 4.5 / rate) for name, rate in shares.items())
    assert found["of_larger"] == pytest.approx(4.5 / 4.1) and found["not_hidden_s"] == pytest.approx(4.0)
    table = markdown([row, made_up("deepspeed", [18.0, 15.0, 17.0], version="0.19.8")])
    assert "| int8 | deepspeed | 17.00 [18.00, 15.00, 17.00] |" in table and "| 26% |" in table
    assert "deepspeed 0.19.8" in table and "| 1.82 | 101%, 83%, 91% |" in table
    assert "read + written: before 1.80, after 2.20, mean 2.00 GB/s (8 MiB, 2 threads, O_DIRECT).\n" in table
    failed = {"work": "8b_24gib", "by": "lowprec", "gpu": "some GPU", "status": "out of memory", "error": "tried"}
    assert "8b_24gib by lowprec: out of memory: tried" in markdown([row, failed | {"versions": {}}])


def test_a_rate_of_a_disk_that_never_settled_is_called_uncertain():
    restless = AFTER | {"settled": False, "probes_gb_s": [0.2, 1.9] * 15}
    table = markdown([made_up("lowprec", [4.0] * 3, raw=RAW | {"after": restless})])
    assert "It never settled after it (0.20 to 1.90 GB/s in 30 probes): shares of that rate are uncertain." in table
    assert "never settled before" not in table


def test_measurements_of_the_disk_are_part_of_the_time(tmp_path):
    """So much is left that a process could begin, and not the measurements around it as well."""
    said = []
    slow = RawMeasurement(seconds=30.0)
    table = bench_ssd_training(["tiny"], path=tmp_path, minutes=1.5, raw=slow, say=said.append)
    assert said == ["The time is used up; the same command goes on from here."] and table == "No results yet.\n"


@pytest.mark.parametrize("left,probes", [(None, 30), (1000.0, 30), (12.5, 4), (0.0, 3)])
def test_a_restless_disk_is_probed_as_long_as_there_is_time(left, probes):
    asked = []

    class Restless:
        def settle(self, block, threads, probe_s, most):
            asked.append((probe_s, most))
            return Settling([0.2] * most)

        def rate(self, mode, block, threads, seconds):
            return 2.0

    taken = RawMeasurement(seconds=8.0).take(Restless(), 1 << 20, 2, left)
    assert asked == [(1.0, probes)] and taken["mixed_gb_s"] == 2.0 and len(taken["probes_gb_s"]) == probes


def test_one_run_of_the_peer_serves_every_format_of_states():
    fp32, int8, clipped, cpu = (KNOWN[name] for name in ("fp32", "int8", "fp32_clip", "fp32_cpu"))
    assert int8.same_peer(fp32) and not clipped.same_peer(clipped) and not cpu.same_peer(fp32)
    rows = [made_up(by, [10.0] * 3, work="fp32") for by in ("lowprec", "deepspeed")] + [made_up("lowprec", [4.0] * 3)]
    table = [line for line in markdown(rows).splitlines() if "[" in line and line.startswith("| ")]
    assert [line.split(" | ")[-1] for line in table[1:]] == ["100% |", " |", "40% |"]


def test_what_cannot_run_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="--works nope is no work of bench ssd"):
        bench_ssd_training(["nope"], path=tmp_path)
    with pytest.raises(UserError, match="the peer here is deepspeed"):
        bench_ssd_training(["tiny"], path=tmp_path, peers=["unsloth"])


def test_host_memory_gained_is_counted_from_what_was_resident():
    """A peak that is over does not hide what comes after it."""
    past = bytearray(b"x" * (200 << 20))
    del past
    before = host_gb()
    held = bytearray(b"x" * (60 << 20))
    assert 0.05 < host_peak_gb() - before < 0.2 and len(held)
