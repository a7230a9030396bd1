"""What is written to a full disk waits for room; a whole run does in test_chaos.py."""

from __future__ import annotations

import errno
import logging
import os
import signal

import pytest

from conf.errors import CheckpointError, DiskFull
from rl import disk
from rl.disk import is_full, once_there_is_room
from rl.interrupts import uninterrupted

FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Takes what is written after it was asked so many times."""

    def __init__(self, refusals: int, error: Exception = FULL) -> None:
        self.refusals, self.error, self.asked = refusals, error, 0

    def write(self) -> str:
        self.asked += 1
        if self.asked <= self.refusals:
            raise self.error
        return "written"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSE_S", 0.01)


def test_what_finds_room_at_once_does_not_wait(caplog: pytest.LogCaptureFixture):
    assert once_there_is_room(Disk(0).write, what="metrics", limit_s=0.0) == "written"
    assert caplog.text == ""


@pytest.mark.parametrize("error", [FULL, OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull("no room")])
def test_a_full_disk_is_asked_again_until_there_is_room_and_told_once(
    error: Exception, caplog: pytest.LogCaptureFixture
):
    full = Disk(3, error)
    with caplog.at_level(logging.WARNING):
        assert once_there_is_room(full.write, what="metrics", limit_s=30.0) == "written"
    assert full.asked == 4
    assert caplog.text.count("no space left for metrics") == 1 and "waits up to 30 s for room" in caplog.text


def test_where_nobody_makes_room_the_disks_own_words_end_the_wait():
    full = Disk(10**9)
    with pytest.raises(DiskFull, match=r"metrics could not be written \(.*No space left.*run.disk_wait_s=0.1.*resume"):
        once_there_is_room(full.write, what="metrics", limit_s=0.1)
    assert full.asked > 2
    full = Disk(10**9, DiskFull("a checkpoint"))
    with pytest.raises(DiskFull, match="a checkpoint"):
        once_there_is_room(full.write, what="metrics", limit_s=0.0)
    assert full.asked == 1


def test_who_interrupts_does_not_wait_for_room():
    full = Disk(10**9)
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        once_there_is_room(full.write, what="metrics", limit_s=30.0)
    assert full.asked == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("a bug"), CheckpointError("damaged")])
def test_another_trouble_is_raised_at_once(error: Exception):
    assert not is_full(error)
    broken = Disk(1, error)
    with pytest.raises(type(error)):
        once_there_is_room(broken.write, what="metrics", limit_s=30.0)
    assert broken.asked == 1
