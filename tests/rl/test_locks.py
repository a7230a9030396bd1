"""Locks on folders, between processes."""

import subprocess
import sys
from pathlib import Path

from rl.locks import locked

HOLD = """
import sys
from pathlib import Path
from rl.locks import locked
lock = locked(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_locked_by_one_process_and_free_when_that_is_killed(tmp_path: Path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        told: list[str] = []
        assert locked(tmp_path, 0.3, lambda: told.append("waiting")) is None
        assert told == ["waiting"], "once, however long it waits"
        other.kill()
        other.wait()
        lock = locked(tmp_path, 10.0)
        assert lock is not None
        lock.close()


def test_a_folder_that_is_not_there_is_made_and_a_lock_can_be_taken_again_once_closed(tmp_path: Path):
    for _ in range(2):
        lock = locked(tmp_path / "new" / "folder")
        assert lock is not None
        lock.close()
