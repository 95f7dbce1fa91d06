import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowprec.checkpoint import atomic_folder, checkpoints, damage, newest_whole, prune, remove_unfinished
from lowprec.errors import UserError


def write(folder: Path, content: bytes = b"weights") -> None:
    with atomic_folder(folder) as writing:
        (writing / "a.bin").write_bytes(content)
        (writing / "sub").mkdir()
        (writing / "sub" / "b.bin").write_bytes(content * 2)


def test_what_safetensors_writes_can_be_read_by_whoever_reads_the_rest(tmp_path):
    with atomic_folder(tmp_path / "final") as writing:
        save_file({"w": torch.zeros(2)}, writing / "model.safetensors")
        (writing / "config.json").write_text("{}")
    modes = {file.stat().st_mode for file in (tmp_path / "final").iterdir()}
    assert len(modes) == 1


def test_sealed_folder_is_whole(tmp_path):
    write(tmp_path / "step-1")
    assert damage(tmp_path / "step-1") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1"]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest"])
def test_damage_is_named(tmp_path, harm):
    write(tmp_path / "step-1")
    file = tmp_path / "step-1" / "sub" / "b.bin"
    if harm == "flip":
        content = bytearray(file.read_bytes())
        content[3] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "remove":
        file.unlink()
    else:
        file = tmp_path / "step-1" / "manifest.json"
        file.write_text("{")
    assert str(file) in (damage(tmp_path / "step-1") or "")


def test_newest_whole_passes_over_damaged_ones(tmp_path):
    for step in (2, 9, 10):
        write(tmp_path / f"step-{step}")
    (tmp_path / "step-10" / "a.bin").write_bytes(b"x")
    newest, complaints = newest_whole(tmp_path)
    assert newest == tmp_path / "step-9"
    assert len(complaints) == 1 and "step-10" in complaints[0]


def test_prune_keeps_the_newest_by_number(tmp_path):
    for step in (2, 9, 10):
        write(tmp_path / f"step-{step}")
    prune(tmp_path / "step-10", 2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-9", "step-10"]


def test_an_existing_folder_is_replaced_whole(tmp_path):
    write(tmp_path / "final", b"old")
    write(tmp_path / "final", b"new")
    assert (tmp_path / "final" / "a.bin").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final"]


def test_failing_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "step-1") as writing:
        (writing / "a.bin").write_bytes(b"half")
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_seen_before_writing(tmp_path):
    write(tmp_path / "step-1")
    with (
        pytest.raises(UserError, match=r"at least [\d,]+ bytes more.*step-1 stays usable"),
        atomic_folder(tmp_path / "step-2", needed_bytes=1 << 60, keeps="step-1 stays usable."),
    ):
        pytest.fail("nothing may be written")
    assert newest_whole(tmp_path)[0] == tmp_path / "step-1"


def test_full_disk_while_writing(tmp_path):
    with (
        pytest.raises(UserError, match="needs at least 993 bytes more"),
        atomic_folder(tmp_path / "s", needed_bytes=1000) as w,
    ):
        (w / "a.bin").write_bytes(b"1234567")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_reported_by_safetensors(tmp_path):
    with pytest.raises(UserError, match="The disk is full"), atomic_folder(tmp_path / "s"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_file_system(tmp_path):
    """Not an injected error: a file system of 1 MiB, and a checkpoint that does not fit its second time."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        write(mount / "step-1", b"x" * 100_000)
        with pytest.raises(UserError, match="The disk is full"):
            write(mount / "step-2", b"x" * 300_000)
        assert newest_whole(mount)[0] == mount / "step-1"
        assert [p.name for p in mount.iterdir()] == ["step-1"]
    finally:
        subprocess.run(["umount", mount], check=True)


def test_killed_while_writing_leaves_the_older_one(tmp_path):
    """SIGKILL at several moments: whatever is visible afterwards is whole, and leftovers are removed."""
    script = (
        "import sys; from pathlib import Path; from lowprec.checkpoint import atomic_folder\n"
        "parent = Path(sys.argv[1]); print('ready', flush=True)\n"
        "for step in range(1, 1000):\n"
        "    with atomic_folder(parent / f'step-{step}') as writing:\n"
        "        for part in range(20): (writing / f'{part}.bin').write_bytes(b'x' * 50000)\n"
    )
    for delay in (0.02, 0.05, 0.11):
        folder = tmp_path / str(delay)
        folder.mkdir()
        writer = subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        while not checkpoints(folder):
            time.sleep(0.001)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        newest, complaints = newest_whole(folder)
        assert newest is not None and complaints == []
        remove_unfinished(folder)
        assert all(p.name.startswith("step-") and damage(p) is None for p in folder.iterdir())


def test_files_with_checksums_of_their_own_are_held_to_their_size(tmp_path):
    with atomic_folder(tmp_path / "step-1", self_checked="optimizer/states-*.bin") as writing:
        (writing / "optimizer").mkdir()
        (writing / "optimizer" / "states-0.bin").write_bytes(b"chunk")
        (writing / "a.bin").write_bytes(b"weights")
    states = tmp_path / "step-1" / "optimizer" / "states-0.bin"
    states.write_bytes(b"other")
    assert damage(tmp_path / "step-1") is None  # the store that reads it finds this
    states.write_bytes(b"cut")
    assert str(states) in (damage(tmp_path / "step-1") or "")


def test_prune_counts_no_damaged_checkpoint_of_a_later_step(tmp_path):
    for step in (50, 100, 200, 150):
        write(tmp_path / f"step-{step}")
    (tmp_path / "step-200" / "a.bin").write_bytes(b"x")
    prune(tmp_path / "step-150", 1)
    assert newest_whole(tmp_path)[0] == tmp_path / "step-150"
    write(tmp_path / "step-200")
    prune(tmp_path / "step-200", 1)
    assert checkpoints(tmp_path) == [tmp_path / "step-200"]


def test_a_folder_that_had_stepped_aside_comes_back_after_a_kill(tmp_path, monkeypatch):
    write(tmp_path / "final", b"old")
    renamed, original = [], Path.rename

    def rename(self, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(self)
        return original(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename)
        write(tmp_path / "final", b"new")
    remove_unfinished(tmp_path)
    assert damage(tmp_path / "final") is None and (tmp_path / "final" / "a.bin").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
