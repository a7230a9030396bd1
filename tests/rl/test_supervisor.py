"""A run that is lost is started again, one that is done, refused or stopped is not, and none for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from rl.exit_codes import LOST, TOLD
from rl.run_folder import RunFolder
from rl.supervisor import supervise, why_lost

RAYS_OWN = 1


class Script:
    """Children that end with these codes, one after the other."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.asked = list(codes), []

    def __call__(self, words: Sequence[str]) -> Script:
        self.asked.append(list(words))
        return self

    def wait(self) -> int:
        return self.codes.pop(0)

    def send_signal(self, sig: int) -> None:
        raise AssertionError("nobody interrupts")


def supervised(tmp_path: Path, script: Script, max_restarts: int = 3) -> tuple[int, list[str]]:
    told: list[str] = []
    return supervise(["seed=1"], tmp_path / "run", max_restarts, told.append, script, pause_s=0.0), told


@pytest.mark.parametrize(("of_child", "code"), [(0, 0), (2, 2), (TOLD, 1), (130, 130), (-signal.SIGTERM, 143)])
def test_a_run_that_is_done_refused_or_stopped_is_not_started_again(tmp_path: Path, of_child: int, code: int):
    script = Script(of_child)
    assert supervised(tmp_path, script) == (code, [])
    assert script.asked == [["seed=1"]] and RunFolder(tmp_path / "run").read_restarts() == []


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(tmp_path: Path):
    script = Script(-signal.SIGKILL, LOST, RAYS_OWN, 0)
    code, told = supervised(tmp_path, script)
    assert code == 0
    assert script.asked == [["seed=1"], *[["seed=1", "run.resume=true"]] * 3]
    assert told == [
        "the run was killed by SIGKILL; starting it again from its last checkpoint (1 of 3)",
        "the run lost a part that it cannot replace; starting it again from its last checkpoint (2 of 3)",
        "the run lost Ray; starting it again from its last checkpoint (3 of 3)",
    ]
    assert RunFolder(tmp_path / "run").read_restarts() == [
        "was killed by SIGKILL",
        "lost a part that it cannot replace",
        "lost Ray",
    ]


def test_a_run_that_is_lost_again_and_again_ends_with_what_to_do(tmp_path: Path):
    code, told = supervised(tmp_path, Script(-signal.SIGSEGV, -signal.SIGSEGV), max_restarts=1)
    assert code == LOST
    assert "run.max_restarts=1 is used up" in told[1] and told[2] == "  grove train seed=1 run.resume=true"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_a_stop_ended_was_not_lost(number: signal.Signals):
    assert why_lost(-number) is None


def test_one_that_a_stop_made_abort_ended_by_the_stop(tmp_path: Path):
    class Aborts(Script):
        def wait(self) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().wait()

        def send_signal(self, sig: int) -> None:
            assert sig == signal.SIGTERM

    assert supervised(tmp_path, Aborts(-signal.SIGABRT)) == (128 + signal.SIGTERM, [])


CHILD = """
import signal, sys, time
def end(number, frame):
    print("checkpoint", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
print("training", flush=True)
time.sleep(60)
"""

PARENT = f"""
import sys
from pathlib import Path
from rl.supervisor import start_process, supervise
def start(words):
    return start_process([sys.executable, "-c", {CHILD!r}])
sys.exit(supervise([], Path(sys.argv[1]), 3, print, start))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupt_reaches_the_run_and_its_end_too(tmp_path: Path, sent: signal.Signals, code: int):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "training\n"
        (child,) = psutil.Process(parent.pid).children()
        parent.send_signal(sent)
        assert parent.wait(timeout=30) == code
        assert parent.stdout.read() == "checkpoint\n"
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()
