"""bench ssd measures, keeps its best setting for the path, and leaves nothing else."""

import json

import pytest
from rich.console import Console

from lowprec.bench import ssd
from lowprec.errors import UserError
from lowprec.optim import AdamW
from lowprec.optim.path_lock import PathLock
from tests.optim.training import make_model, train


def test_it_measures_and_the_store_uses_what_it_kept(tmp_path):
    report = ssd.run(tmp_path, seconds=0.5, size_gib=0.125)
    assert len(report.rates) == len(ssd.BLOCKS) * len(ssd.THREADS)
    assert all(min(rate.read_gb_s, rate.write_gb_s) > 0 for rate in report.rates)
    assert report.best.mixed_gb_s == max(rate.mixed_gb_s for rate in report.rates)
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
