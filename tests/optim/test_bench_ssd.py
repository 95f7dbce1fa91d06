"""bench ssd measures, keeps its best setting for the path, and leaves nothing else."""

import json

import pytest
from rich.console import Console

from lowprec.bench import ssd
from lowprec.bench.raw_disk import AGREE, MOST_PROBES, RawFile
from lowprec.errors import UserError
from lowprec.optim import AdamW
from lowprec.optim.path_lock import PathLock
from lowprec.optim.stores import TUNED_FILE
from tests.optim.training import make_model, train


def test_it_measures_and_the_store_uses_what_it_kept(tmp_path):
    report = ssd.run(tmp_path, seconds=0.5, size_gib=0.125)
    assert len(report.rates) == len(ssd.BLOCKS) * len(ssd.THREADS)
    assert all(min(rate.read_gb_s, rate.write_gb_s) > 0 for rate in report.rates)
    finalists = sorted(report.rates, key=lambda rate: rate.mixed_gb_s)[-ssd.FINALISTS :]
    assert report.best in finalists and report.sustained_mixed_gb_s > 0
    console = Console(record=True, width=120)
    console.print(report.table())
    assert "mixed" in console.export_text()
    json.dumps(report.to_dict())
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text()) == {
        "chunk_bytes": int(report.best.block_mib * 2**20),
        "threads": report.best.threads,
    }
    kept.write_text(json.dumps({"chunk_bytes": 30_000, "threads": 3}))
    model = make_model()
    optimizer = AdamW(model.named_parameters(), state_store="ssd", path=tmp_path, pinned_gib=0.001)
    train(model, optimizer, 1)
    assert max(chunk.nbytes for chunk in optimizer._store.chunks) <= 30_000
    optimizer.close()
    assert kept.exists()


def test_it_leaves_a_path_in_use_alone(tmp_path):
    lock = PathLock(tmp_path)
    with pytest.raises(UserError, match="in use by process"):
        ssd.run(tmp_path)
    lock.release()


def test_the_sustained_rate_decides_and_not_a_lucky_moment(tmp_path, monkeypatch):
    """8 MiB and 16 threads shine for a moment; 2 MiB and 8 threads, second to them, hold their rate."""
    asked = []

    def rate(self, mode, block, threads, seconds):
        asked.append((mode, block, threads))
        again = asked.count((mode, block, threads)) > 1
        if (block, threads) == (8 << 20, 16):
            return 1.5 if again else 4.0
        return 2.0 if (block, threads) == (2 << 20, 8) else 1.0

    monkeypatch.setattr(RawFile, "rate", rate)
    report = ssd.run(tmp_path, size_gib=0.03125)
    assert (report.best.block_mib, report.best.threads, report.sustained_mixed_gb_s) == (2, 8, 2.0)
    assert json.loads((tmp_path / TUNED_FILE).read_text()) == {"chunk_bytes": 2 << 20, "threads": 8}


@pytest.mark.parametrize(
    "rates,probes,settled",
    [
        ([2.0], AGREE, True),
        ([0.2, 0.9, 1.85, 2.0, 1.9], 5, True),  # writes of before go on for two probes
        ([2.0, 2.0, 1.5, 2.0, 2.0, 2.1], 6, True),
        ([1.0, 2.0] * MOST_PROBES, MOST_PROBES, False),
        ([0.0], MOST_PROBES, False),  # a disk that stands still agrees with itself
    ],
)
def test_a_disk_has_settled_when_probes_agree(tmp_path, monkeypatch, rates, probes, settled):
    """The last rate goes on."""
    given = iter(rates)
    monkeypatch.setattr(RawFile, "rate", lambda *args: next(given, rates[-1]))
    with RawFile(tmp_path, 0.001, 65536, 1) as file:
        settling = file.settle(65536, 1, 1.0)
    assert (len(settling.probes_gb_s), settling.settled) == (probes, settled)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_measurement_left_is_no_hindrance(tmp_path):
    left = RawFile(tmp_path, 0.001, 65536, 1)
    with RawFile(tmp_path, 0.001, 65536, 1) as file:
        assert file.rate("mixed", 65536, 1, 0.1) > 0
    left._file.close()


def test_a_table_says_that_a_disk_never_settled():
    rate = ssd.Rate(8, 2, 1.0, 1.0, 1.0)
    for settled in (True, False):
        report = ssd.SsdReport("disk", True, settled, [rate], rate, 1.0, 6.0)
        assert ("never settled" in report.table().caption) is not settled
