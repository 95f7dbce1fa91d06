"""Signals to a process that trains, by themselves; what a run does with them is in test_resume and test_distributed."""

import signal

import pytest

from lowprec.train.interrupt import stop_on_signals


@pytest.mark.parametrize(("launched", "more"), [(False, 0), (True, 1)])
def test_how_many_interrupts_stop_at_once(launched, more, monkeypatch):
    """A launcher hands the terminal's Ctrl-C on, so that one press arrives as two signals."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stop_on_signals() as stop:
        for _ in range(1 + more):
            signal.raise_signal(signal.SIGINT)
            assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_ctrl_c_after_another_signal_stops_at_once(name, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with stop_on_signals() as stop:
        signal.raise_signal(signal.Signals[name])
        signal.raise_signal(signal.Signals[name])
        assert stop.signal_name == name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
