from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from conf.errors import WaitTimeout
from rl.background import Background


def test_the_caller_goes_on_once_it_may_and_the_work_ends_behind_it():
    gate, done = threading.Event(), []

    def work(go_on: Callable[[], None]) -> None:
        done.append("copied")
        go_on()
        gate.wait(5)
        done.append("written")

    background = Background("the checkpoint", 5.0)
    background.begin(work)
    assert done == ["copied"]
    gate.set()
    background.wait()
    assert done == ["copied", "written"]


def test_the_next_waits_for_the_one_before():
    order = []

    def work(name: str) -> Callable[[Callable[[], None]], None]:
        def run(go_on: Callable[[], None]) -> None:
            go_on()
            threading.Event().wait(0.02)
            order.append(name)

        return run

    background = Background("the checkpoint", 5.0)
    background.begin(work("first"))
    background.begin(work("second"))
    assert order == ["first"]
    background.wait()
    assert order == ["first", "second"]


def test_what_goes_wrong_after_the_caller_went_on_is_told_once_where_it_is_asked():
    gate = threading.Event()

    def work(go_on: Callable[[], None]) -> None:
        go_on()
        gate.wait(5)
        raise OSError("the disk is full")

    background = Background("the checkpoint", 5.0)
    background.begin(work)
    background.check()  # nothing yet
    gate.set()
    with pytest.raises(OSError, match="the disk is full"):
        background.wait()
    background.check()


def test_what_goes_wrong_before_the_caller_may_go_on_is_raised_there():
    def work(go_on: Callable[[], None]) -> None:
        raise OSError("no folder")

    with pytest.raises(OSError, match="no folder"):
        Background("the checkpoint", 5.0).begin(work)


def test_work_that_never_ends_is_a_time_out():
    gate = threading.Event()
    background = Background("the checkpoint", 0.02)
    with pytest.raises(WaitTimeout, match="the end of the checkpoint did not come within 0 s"):
        background.begin(lambda go_on: gate.wait(5) and None)
    gate.set()
