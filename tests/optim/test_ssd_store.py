"""The ssd store: bounded memory, faults of the disk, checksums, locks, versions that checkpoints link."""

import copy
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lowprec.errors import UserError
from lowprec.optim import AdamW
from lowprec.optim.disk import ALIGNMENT, Disk
from lowprec.optim.export import export, load_exported
from lowprec.optim.path_lock import clean
from lowprec.optim.stores import TUNED_FILE
from tests.optim.training import backward, make_model, run, same, ssd, start, train


class FaultyDisk(Disk):
    """Once ``good_calls`` are used up, every call of ``method`` has the fault: an errno, ``short`` or ``flip``."""

    def __init__(self, method: str, fault: int | str, good_calls: float = float("inf")):
        self.good_calls = good_calls
        original = getattr(self, method)

        def call(*args):
            self.good_calls -= 1
            if self.good_calls >= 0:
                return original(*args)
            if fault == "short":
                return original(args[0], args[1][: len(args[1]) // 2], args[2])
            if fault == "flip":
                count = original(*args)
                args[1][100] ^= 4
                return count
            raise OSError(fault, os.strerror(fault))

        setattr(self, method, call)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENODEV, "short"])
@pytest.mark.parametrize("method", ["write", "read"])
def test_a_fault_of_the_disk_stops_the_run_and_leaves_the_checkpoint(tmp_path, method, fault):
    expected, _ = run(8, torch.bfloat16)
    disk = FaultyDisk(method, fault)
    model, optimizer = start(tmp_path / "states", disk=disk)
    optimizer.save_states(tmp_path / "checkpoint")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    disk.good_calls = 5
    with pytest.raises(UserError, match="last checkpoint is intact"):
        train(model, optimizer, 20, start=4)
    with pytest.raises(UserError, match="disk failed"):
        optimizer.save_states(tmp_path / "too late")
    optimizer.close()

    model = make_model(torch.bfloat16)
    model.load_state_dict(weights)
    again = AdamW(model.named_parameters(), **ssd(tmp_path / "states"))
    again.load_states(tmp_path / "checkpoint")
    assert same(train(model, again, 8, start=4), expected)
    again.close()


def test_a_full_disk_shows_at_the_start_with_the_bytes_needed_and_free(tmp_path):
    with pytest.raises(UserError, match=r"cannot reserve 0\.00 GiB .* GiB are free \(No space left on device\)"):
        AdamW(make_model().named_parameters(), **ssd(tmp_path, disk=FaultyDisk("allocate", errno.ENOSPC, 0)))
    assert list(tmp_path.iterdir()) == [], "what was begun is taken back, the lock too"


def test_no_room_for_the_reserved_checkpoint_shows_in_the_first_step(tmp_path):
    with pytest.raises(UserError, match="reserve_checkpoints=0"):
        start(tmp_path, disk=FaultyDisk("allocate", errno.ENOSPC, 1))


def test_a_flipped_bit_names_file_chunk_and_parameter(tmp_path):
    disk = FaultyDisk("read", "flip")
    model, optimizer = start(tmp_path / "states", disk=disk)
    disk.good_calls = 0
    with pytest.raises(
        UserError,
        match=r"lowprec-states-000001-0\.bin is damaged at byte \d+ \(chunk \d+, states of [\d.]+(weight|bias)",
    ):
        train(model, optimizer, 10, start=4)
    optimizer.close()


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    model, optimizer = start(tmp_path / "states")
    optimizer.save_states(tmp_path / "checkpoint")
    optimizer.close()
    with (tmp_path / "checkpoint" / "states-000.bin").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    again = AdamW(model.named_parameters(), **ssd(tmp_path / "states"))
    again.load_states(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="states-000.bin is damaged at byte 0 "):
        train(model, again, 6, start=4)
    again.close()


def test_a_checkpoint_takes_no_copy_and_is_never_written_again(tmp_path):
    model, optimizer = start(tmp_path / "states")
    optimizer.flush()
    written = optimizer.statistics()["written_gb"]
    optimizer.save_states(tmp_path / "checkpoint")
    assert optimizer.statistics()["written_gb"] == written
    kept = tmp_path / "checkpoint" / "states-000.bin"
    assert any(kept.samefile(path) for path in (tmp_path / "states").iterdir()), "the same blocks under a second name"
    before = kept.read_bytes()
    train(model, optimizer, 8, start=4)
    optimizer.flush()
    assert kept.read_bytes() == before and kept.stat().st_nlink == 1
    optimizer.close()


@pytest.mark.parametrize("cut", [{}, {"chunk_bytes": 50_000}, {"path": ["x", "y"]}])
def test_states_resume_under_another_path_and_another_cut(tmp_path, cut):
    expected, _ = run(8, torch.bfloat16)
    model, optimizer = start(tmp_path / "states")
    optimizer.save_states(tmp_path / "checkpoint")
    optimizer.close()
    path = [tmp_path / name for name in cut.get("path", ["elsewhere"])]
    again = AdamW(model.named_parameters(), **ssd(path) | {k: v for k, v in cut.items() if k != "path"})
    again.load_states(tmp_path / "checkpoint")
    again.save_states(tmp_path / "second")  # of states that no step has touched yet
    assert same(train(model, again, 8, start=4), expected)
    again.close()


@pytest.mark.parametrize("store", [{"state_store": "gpu"}, {"state_store": "cpu", "chunk_bytes": 30_000}])
def test_states_resume_in_other_stores_and_back(tmp_path, store):
    expected, _ = run(8, torch.bfloat16)
    model, optimizer = start(tmp_path / "states")
    optimizer.save_states(tmp_path / "a")
    optimizer.close()
    memory = AdamW(model.named_parameters(), **store)
    memory.load_states(tmp_path / "a")
    train(model, memory, 6, start=4)
    memory.save_states(tmp_path / "b")
    again = AdamW(model.named_parameters(), **ssd(tmp_path / "states"))
    again.load_states(tmp_path / "b")
    assert same(train(model, again, 8, start=6), expected)
    again.close()


def test_where_no_link_can_be_made_the_states_are_copied_after_a_check_of_the_space(tmp_path):
    class OtherFileSystem(Disk):
        room = 1 << 40

        def link(self, source, target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        def free(self, folder):
            return self.room

    disk = OtherFileSystem()
    expected, _ = run(8, torch.bfloat16)
    model, optimizer = start(tmp_path / "states", disk=disk)
    disk.room = 1000
    with pytest.raises(UserError, match="must be copied: .* are free there"):
        optimizer.save_states(tmp_path / "none")
    assert not (tmp_path / "none" / "optimizer.json").exists()
    disk.room = 1 << 40
    optimizer.save_states(tmp_path / "checkpoint")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, optimizer, 6, start=4)  # goes on in place: the copy is not touched
    optimizer.close()
    model.load_state_dict(weights)
    again = AdamW(model.named_parameters(), **ssd(tmp_path / "states"))
    again.load_states(tmp_path / "checkpoint")
    assert same(train(model, again, 8, start=4), expected)
    again.close()


def test_host_memory_is_bounded_whatever_the_size_of_a_parameter(tmp_path):
    big = torch.nn.Parameter(torch.zeros(3_000_000))  # 24 MB of states through 1 MB of buffers
    optimizer = AdamW([("big", big)], state_store="ssd", path=tmp_path, chunk_bytes=1 << 16, pinned_gib=0.001)
    for _ in range(3):
        big.grad = torch.ones_like(big)
        optimizer.step()
    assert optimizer._store._memory.tensor.numel() <= 0.001 * 2**30 + 2 * ALIGNMENT
    assert torch.equal(big.detach(), big[0].expand_as(big))
    optimizer.close()
    with pytest.raises(UserError, match=r"pinned_gib=0.001 holds 0 buffers of 8\.0 MiB"):
        AdamW([("big", big)], state_store="ssd", path=tmp_path, pinned_gib=0.001)


def test_too_few_buffers_for_the_transfers_are_told_with_what_would_do(tmp_path):
    big = torch.nn.Parameter(torch.zeros(3_000_000))
    keywords = {"state_store": "ssd", "path": tmp_path, "chunk_bytes": 1 << 20, "threads": 4}
    scarce = AdamW([("big", big)], pinned_gib=0.005, **keywords)
    note = next(note for note in scarce.notes if "pinned_gib" in note)
    assert "pinned_gib=0.005 holds 5 buffers of 1.0 MiB" in note and "4 reads and 4 writes at a time" in note
    enough = float(note.rpartition("set it to ")[2].rstrip("."))
    scarce.close()
    plenty = AdamW([("big", big)], pinned_gib=enough, **keywords)
    assert enough < 0.01 and not any("pinned_gib" in note for note in plenty.notes)
    plenty.close()
    small = torch.nn.Parameter(torch.zeros(1000))  # one chunk: more buffers would stay empty
    alone = AdamW([("small", small)], pinned_gib=0.0005, **keywords)
    assert not any("pinned_gib" in note for note in alone.notes)
    alone.close()


def test_a_path_serves_one_run_and_names_it(tmp_path):
    _, optimizer = start(tmp_path)
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "):
        AdamW(make_model().named_parameters(), **ssd(tmp_path))
    with pytest.raises(UserError, match="in use by process"):
        clean(tmp_path)
    optimizer.close()
    assert list(tmp_path.iterdir()) == []
    start(tmp_path)[1].close()


def test_a_path_that_can_be_no_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "states"):
        with pytest.raises(UserError, match=f"state_store.path={path} cannot be used"):
            AdamW(make_model().named_parameters(), **ssd(path))


def test_a_damaged_tuned_setting_is_named(tmp_path):
    for text in ("{bad", "[]", '{"threads": 2}'):
        (tmp_path / TUNED_FILE).write_text(text)
        with pytest.raises(UserError, match=f"{TUNED_FILE} is damaged .* bench ssd"):
            AdamW(make_model().named_parameters(), state_store="ssd", path=tmp_path)


def test_leftovers_of_a_killed_run_are_in_nobodys_way_and_can_be_cleaned(tmp_path):
    code = (
        "import sys, time; from tests.optim.test_ssd_store import start; from pathlib import Path; p = "
        "Path(sys.argv[1]);"
        "_, o = start(p / 'states'); o.save_states(p / 'checkpoint'); start; (p / 'ready').touch(); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    while not (tmp_path / "ready").exists():
        assert child.poll() is None
        time.sleep(0.05)
    with pytest.raises(UserError, match=rf"in use by process {child.pid}"):
        clean(tmp_path / "states")
    child.kill()
    child.wait()
    left = [path.name for path in (tmp_path / "states").glob("*.bin")]
    assert left
    removed = clean(tmp_path / "states")
    assert set(removed) == set(left) and list((tmp_path / "states").iterdir()) == []
    again = AdamW(make_model(torch.bfloat16).named_parameters(), **ssd(tmp_path / "states"))
    again.load_states(tmp_path / "checkpoint")  # its links keep the states
    again.close()
    with pytest.raises(UserError, match="is not a folder"):
        clean(tmp_path / "nothing")


def test_a_file_system_without_o_direct_is_announced_and_works(tmp_path):
    class NoDirect(Disk):
        def open(self, path, flags):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().open(path, flags)

    expected, _ = run(6, torch.bfloat16)
    model, optimizer = start(tmp_path, steps=6, disk=NoDirect())
    assert "page cache" in optimizer.notes[0] and str(tmp_path) in optimizer.notes[0]
    assert same([p.detach() for p in model.parameters()], expected)
    optimizer.close()


def test_statistics_count_what_the_kernel_counts(tmp_path):
    def io():
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["read_bytes"]), int(lines["write_bytes"])

    before = io()
    _, optimizer = start(tmp_path, steps=5, drive_tbw=600)
    optimizer.flush()
    read, written = (now - then for now, then in zip(io(), before, strict=True))
    facts = optimizer.statistics(num_steps=10)
    assert abs(read - facts["read_gb"] * 1e9) < 0.05 * read + 2**20
    assert abs(written - facts["written_gb"] * 1e9) < 0.05 * written + 2**20
    assert facts["bytes_per_parameter"] == 10 and facts["projected_written_gb"] == pytest.approx(
        2 * facts["written_gb"]
    )
    assert facts["projected_drive_share"] == pytest.approx(facts["projected_written_gb"] / 600e3)
    json.dumps(facts)
    optimizer.close()


@pytest.mark.parametrize(("state_dtype", "master"), [("fp32", "split"), ("int8", "split"), ("fp32", "fp32")])
def test_export_is_a_state_dict_of_torch_adamw(tmp_path, state_dtype, master):
    from safetensors.torch import save_model

    model, optimizer = start(tmp_path / "states", state_dtype=state_dtype, master=master)
    optimizer.save_states(tmp_path / "checkpoint")
    optimizer.close()
    save_model(model, str(tmp_path / "weights.safetensors"))
    export(tmp_path / "checkpoint", tmp_path / "out", tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="holds optimizer states already"):
        export(tmp_path / "checkpoint", tmp_path / "out")
    with pytest.raises(UserError, match="--weights .*none is not a file"):
        export(tmp_path / "checkpoint", tmp_path / "other", tmp_path / "none")
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / "optimizer").symlink_to(tmp_path / "checkpoint")
    export(tmp_path / "step-4", tmp_path / "other")
    assert (tmp_path / "other" / "optimizer.json").exists()

    exported = load_exported(tmp_path / "out")
    exact = make_model()  # fp32, from the masters
    from lowprec.optim.states_io import Shards

    shards = Shards(tmp_path / "out", json.loads((tmp_path / "out" / "optimizer.json").read_text())["shards"])
    with torch.no_grad():
        for name, param in exact.named_parameters():
            param.copy_(shards.fields_of(name)["master"])
    reference = torch.optim.AdamW(exact.named_parameters(), lr=1.0)
    reference.load_state_dict(exported)
    assert reference.param_groups[0]["lr"] == 1e-2 and reference.state[exact[0].weight]["step"] == 4

    continued = AdamW(model.named_parameters(), state_dtype=state_dtype, master=master)
    continued.load_states(tmp_path / "checkpoint")
    backward(model, 4)
    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        theirs.grad = mine.grad.float()
    continued.step()
    reference.step()
    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=2**-8, atol=1e-6)


def test_a_state_dict_is_right_with_more_chunks_than_buffers_and_stays_so(tmp_path):
    def build(**options):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(64, 32)) for _ in range(40)]
        return params, AdamW(params, lr=1e-2, **options)

    def step(params, optimizer, number):
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, 1.0 + i + number)
        optimizer.step()

    small = {"chunk_bytes": 33_000, "pinned_gib": 0.00025}
    (mine, streamed), (theirs, resident) = build(**ssd(tmp_path, **small)), build()
    for number in range(2):
        step(mine, streamed, number)
        step(theirs, resident, number)
    found, expected = streamed.state_dict()["state"], copy.deepcopy(resident.state_dict()["state"])
    step(mine, streamed, 2)
    assert len(streamed._store.chunks) > 2 * streamed._store._num_buffers
    for i in expected:
        assert all(torch.equal(found[i][name], expected[i][name]) for name in expected[i])


def test_a_read_ahead_that_fails_does_not_let_a_step_wait_for_ever(tmp_path):
    disk = FaultyDisk("read", errno.EIO)
    model, optimizer = start(tmp_path / "states", disk=disk)
    disk.good_calls = 0
    optimizer._store.prefetch(optimizer._store.chunks)
    backward(model, 5)
    for parameter in list(model.parameters())[:1]:
        parameter.grad = None  # of chunks that were read ahead, and that nobody asks for
    with pytest.raises(UserError, match="disk failed"):
        optimizer.step()
    optimizer.close()


def test_where_host_memory_is_refused_no_file_is_left(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise UserError("The system refuses to pin")

    monkeypatch.setattr("lowprec.optim.ssd_store.HostMemory", refuse)
    with pytest.raises(UserError, match="refuses to pin"):
        start(tmp_path / "states")
    assert not list((tmp_path / "states").glob("*.bin"))
