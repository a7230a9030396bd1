from __future__ import annotations

import os
import signal

import pytest

from rl.interrupts import terminate_as_interrupt, uninterrupted


def tell_myself(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_a_schedulers_sigterm_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        tell_myself(signal.SIGTERM)
