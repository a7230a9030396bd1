from __future__ import annotations

import os
import signal

import pytest

from rl.interrupts import end_as_interrupt, handlers_kept, uninterrupted


def tell_myself(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_an_interrupt_waits_until_the_block_is_through(number: int):
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        tell_myself(number)
        done.append("all of it")
    assert done == ["all of it"]


def test_without_an_interrupt_nothing_is_raised_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with uninterrupted():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_error_inside_the_block_is_not_hidden_by_the_interrupt():
    with pytest.raises(ValueError, match="broken"), uninterrupted():
        tell_myself(signal.SIGINT)
        raise ValueError("broken")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_scheduler_and_a_lost_terminal_interrupt(number: int):
    with pytest.raises(KeyboardInterrupt), end_as_interrupt():
        tell_myself(number)


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with end_as_interrupt(), uninterrupted():
            tell_myself(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_library_that_takes_signals_for_itself_gives_them_back():
    with end_as_interrupt():
        with handlers_kept():
            signal.signal(signal.SIGTERM, lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            tell_myself(signal.SIGTERM)
