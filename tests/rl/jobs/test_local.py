"""A process of this machine is started, watched, stopped, and never taken for another."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from conf.schema import LaunchConfig
from rl.jobs.local import ThisMachine
from rl.jobs.plan import Plan
from rl.jobs.record import Launch, State

pytestmark = pytest.mark.slow

SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(130)))
print("training", flush=True)
print("a warning", file=sys.stderr, flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(f"child {child.pid}", flush=True)
time.sleep(60)
"""


@dataclass(frozen=True, kw_only=True)
class Script(Plan):
    """A plan that runs a script in the place of a run."""

    code: str

    def start_words(self, python: str, versions: str = "") -> list[str]:
        return [python, "-c", self.code]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], Launch]]:
    """Starts scripts, and leaves none behind."""
    launches = []

    def start(code: str, stop_limit_s: int = 60) -> Launch:
        plan = Script(
            job="x",
            here=tmp_path,
            there=str(tmp_path),
            words=(),
            launch=LaunchConfig(),
            num_steps=1,
            command="",
            code=code,
        )
        launch = dataclasses.replace(ThisMachine().start(plan), stop_limit_s=stop_limit_s)
        launches.append(launch)
        return launch

    yield start
    for launch in launches:
        try:
            os.killpg(int(launch.job), signal.SIGKILL)
        except ProcessLookupError:
            continue


def printed(launch: Launch, word: str) -> str:
    """The log once it holds a word."""
    while word not in (text := Path(launch.log).read_text()):
        time.sleep(0.02)
    return text


def test_it_runs_in_a_session_of_its_own_until_it_is_stopped_and_saves(started):
    place, launch = ThisMachine(), started(SAVES)
    printed(launch, "a warning")
    assert place.state(launch) is State.running
    assert os.getsid(int(launch.job)) == int(launch.job) != os.getsid(0)
    place.stop(launch)
    assert place.state(launch) is None
    assert "".join(place.log(launch, follow=True)) == "training\na warning\nsaved\n"
    place.stop(launch)  # once more, of nothing


def test_one_that_does_not_listen_is_killed_with_all_that_it_started(started):
    launch = started(STUBBORN, stop_limit_s=1)
    child = psutil.Process(int(printed(launch, "child ").split()[1]))
    ThisMachine().stop(launch)
    assert ThisMachine().state(launch) is None
    psutil.wait_procs([child], timeout=10)  # the kernel takes a moment
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_has_got_the_number_of_one_that_ended_is_let_alone(started):
    launch = started(SAVES)
    printed(launch, "training")
    former = dataclasses.replace(launch, process_started=launch.process_started - 3600)
    assert ThisMachine().state(former) is None
    ThisMachine().stop(former)
    assert ThisMachine().state(launch) is State.running


def test_a_second_start_goes_on_in_the_same_log(started):
    for _ in range(2):
        launch = started("print('once')")
        assert "".join(ThisMachine().log(launch, follow=True)).startswith("once")
    assert Path(launch.log).read_text() == "once\nonce\n"
