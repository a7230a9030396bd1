from __future__ import annotations

import asyncio
import threading

import pytest

import rollout.patience
from conf.errors import WaitTimeout
from rollout.patience import some_done, wait_for


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.patience, "SAY_AFTER_S", 0.05)


def test_what_comes_is_given_and_no_word_is_said_of_a_short_wait(caplog: pytest.LogCaptureFixture):
    assert wait_for(lambda wait_s: "it", limit_s=5, what="it") == "it"
    assert caplog.text == ""


def test_a_long_wait_says_what_it_is_for_and_goes_on(caplog: pytest.LogCaptureFixture):
    lock = threading.Lock()
    lock.acquire()
    threading.Timer(0.12, lock.release).start()
    assert wait_for(lambda wait_s: lock.acquire(timeout=wait_s) or None, limit_s=30, what="the lock")
    assert "still waiting for the lock after 0 s (limit 30 s)" in caplog.text


def test_a_wait_ends_with_what_was_awaited_and_what_to_do():
    lock = threading.Lock()
    lock.acquire()
    with pytest.raises(WaitTimeout, match=r"the lock did not come within 0 s. Look into the run's logs/ folder"):
        wait_for(lambda wait_s: lock.acquire(timeout=wait_s) or None, limit_s=0.1, what="the lock")


def ended(*seconds: float, limit_s: float, all_of_them: bool = False) -> int:
    async def run() -> int:
        tasks = [asyncio.create_task(asyncio.sleep(each)) for each in seconds]
        done, waiting = await some_done(tasks, limit_s=limit_s, what="naps", all_of_them=all_of_them)
        for task in waiting:
            task.cancel()
        assert len(done) + len(waiting) == len(tasks)
        return len(done)

    return asyncio.run(run())


def test_tasks_are_awaited_until_the_first_or_the_last_has_ended_or_time_is_up(caplog: pytest.LogCaptureFixture):
    assert ended(0.0, 30.0, limit_s=30) == 1
    assert ended(0.0, 0.15, limit_s=30, all_of_them=True) == 2
    assert "still waiting for 1 naps after 0 s (limit 30 s)" in caplog.text
    assert ended(0.0, 30.0, limit_s=0.2, all_of_them=True) == 1
    assert ended(30.0, limit_s=0.1) == 0
    assert ended(limit_s=1.0) == 0
