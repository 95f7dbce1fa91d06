"""An entry is whole or it is built again."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from lowprec.checkpoint import MANIFEST
from lowprec.data.cache import cache_key, cached, tokenizer_fingerprint
from lowprec.errors import UserError
from lowprec.testing import tiny_tokenizer


def counting(log: Path):
    """A build that leaves a line for each time it runs."""

    def build(folder: Path) -> None:
        (folder / "data").write_text("contents")
        with log.open("a") as file:
            file.write("built\n")

    return build


def times(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_built_once_then_read(tmp_path: Path) -> None:
    build = counting(tmp_path / "log")
    first, second = (cached(tmp_path / "c", "key", build) for _ in range(2))
    assert first == second and (first / "data").read_text() == "contents"
    assert times(tmp_path / "log") == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no manifest", "bad manifest"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    build = counting(tmp_path / "log")
    entry = cached(tmp_path / "c", "key", build)
    match damage:
        case "truncate":
            (entry / "data").write_text("cont")
        case "flip":
            (entry / "data").write_text("Contents")
        case "remove":
            (entry / "data").unlink()
        case "no manifest":
            (entry / MANIFEST).unlink()
        case "bad manifest":
            (entry / MANIFEST).write_text("[1")
    assert (cached(tmp_path / "c", "key", build) / "data").read_text() == "contents"
    assert times(tmp_path / "log") == 2


def _build_slowly(folder: Path, log: Path, started: Path) -> None:
    def build(target: Path) -> None:
        started.write_text("")
        time.sleep(0.3)
        counting(log)(target)
        time.sleep(0.3)

    cached(folder, "key", build)


def _spawn(tmp_path: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("forkserver").Process(
        target=_build_slowly, args=(tmp_path / "c", tmp_path / "log", tmp_path / "started")
    )
    process.start()
    return process


def test_two_processes_build_once(tmp_path: Path) -> None:
    processes = [_spawn(tmp_path) for _ in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert times(tmp_path / "log") == 1


def test_what_a_killed_process_leaves_is_never_read(tmp_path: Path) -> None:
    process = _spawn(tmp_path)
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)  # after its file, before its manifest
    process.join(60)
    assert not (tmp_path / "c" / "key").exists() and list((tmp_path / "c").glob(".writing-key*"))
    entry = cached(tmp_path / "c", "key", counting(tmp_path / "log"))
    assert (entry / "data").read_text() == "contents"
    assert not list((tmp_path / "c").glob(".writing-key*"))


def test_an_error_of_the_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise UserError("bad record")

    with pytest.raises(UserError, match="bad record"):
        cached(tmp_path, "key", build)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_a_cache_that_cannot_be_written_names_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        cached(tmp_path / "file", "key", counting(tmp_path / "log"))


def test_keys_follow_what_decides() -> None:
    assert cache_key(a=1, b="x") == cache_key(b="x", a=1) != cache_key(a=2, b="x")


def test_the_tokenizer_s_fingerprint() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    reference = tokenizer_fingerprint(one)
    one("ab", padding="max_length", max_length=9, truncation=True)  # leaves its marks in the tokenizer
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other) == reference
    other.add_tokens(["<new>"])
    assert tokenizer_fingerprint(other) != reference
    one.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(one) != reference


def test_data_that_cannot_be_read_are_not_told_as_the_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="chats"):
        cached(tmp_path / "cache", "key", lambda folder: (tmp_path / "chats.jsonl").read_text())
