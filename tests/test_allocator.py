"""Settings of device memory."""

import os

import pytest

from lowprec.allocator import NAMES, use_expandable_segments


@pytest.mark.parametrize("taken", [None, *NAMES])
def test_what_the_user_has_set_stays(monkeypatch, taken):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if taken is not None:
        monkeypatch.setenv(taken, "max_split_size_mb:128")
    use_expandable_segments()
    found = {name: os.environ[name] for name in NAMES if name in os.environ}
    expected = {NAMES[0]: "expandable_segments:True"} if taken is None else {taken: "max_split_size_mb:128"}
    assert found == expected
    monkeypatch.delenv(NAMES[0], raising=False)
