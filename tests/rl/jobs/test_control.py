"""Launching by the command line: what is refused, what is followed, what is continued. The place is this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from conf.compose import compose
from conf.errors import LaunchError
from rl.cli import main
from rl.jobs import local, place
from rl.jobs.control import launch_in, state_of
from rl.jobs.plan import Plan
from rl.jobs.record import Ending, State, read_launch, write_ending
from rl.run_folder import settings

RUN = [
    "-c",
    "import pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(130)))\n"
    "print('step 2/9  held-out 25.0%', flush=True)\n"
    "while not pathlib.Path('end').exists(): time.sleep(0.02)\n",
]
LAUNCH = ["launch", "local", "experiment=hop_search", "rollout.num_workers=1"]
FOLDER = Path("runs/hop_search-seed0")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder whose launched runs are a script that waits for a file `end`; none is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(Plan, "start_words", lambda self, python, versions="": [python, *RUN])
    yield tmp_path
    launch = read_launch(FOLDER)
    if launch is not None and launch.kind == "local" and local.ThisMachine().state(launch):
        os.killpg(int(launch.job), signal.SIGKILL)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    read = capsys.readouterr()
    return read.out + read.err


def wait_for_step() -> None:
    while "step 2" not in (FOLDER / "logs/console.log").read_text():
        time.sleep(0.02)


def test_a_run_is_launched_listed_read_stopped_and_launched_again(room: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["jobs"]) == 0
    assert "no run below runs was launched" in said(capsys)
    assert main(LAUNCH) == 0
    assert "started runs/hop_search-seed0 as local job" in said(capsys)
    wait_for_step()
    assert main(["jobs"]) == 0
    row = said(capsys).splitlines()[1].split()
    assert row[0] == "runs/hop_search-seed0" and row[3:6] == ["running", "2/500", "25.0%"]
    assert main(["logs", "hop_search-seed0"]) == 0
    assert said(capsys) == "step 2/9  held-out 25.0%\n"
    (FOLDER / "checkpoints/step_000002").mkdir(parents=True)
    assert main(["stop", "hop_search-seed0"]) == 0
    write_ending(FOLDER, Ending(exit_code=130, at=0.0, pid=1))
    assert "its newest checkpoint is of step 2. Continue it with:\n  grove launch local experiment=" in said(capsys)
    assert state_of(*launch_in("hop_search-seed0")) is State.stopped
    assert main(["stop", "hop_search-seed0"]) == 0
    assert "does not run: it is stopped" in said(capsys)
    (FOLDER / "metrics.jsonl").write_text('{"step": 2}\n')
    assert main(LAUNCH) == 0
    assert "continues runs/hop_search-seed0 as local job" in said(capsys)
    assert state_of(*launch_in("hop_search-seed0")) is State.running  # how it ended before is forgotten


def test_a_run_that_goes_on_is_followed_until_it_ends_and_not_started_twice(
    room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main(LAUNCH) == 0
    first, follow = read_launch(FOLDER), local.followed

    def end_once_followed(path: Path, *, is_over: Callable[[], bool]) -> Iterator[str]:
        (room / "end").touch()
        return follow(path, is_over=is_over)

    monkeypatch.setattr(local, "followed", end_once_followed)
    assert main(LAUNCH) == 0
    assert read_launch(FOLDER) == first
    _, _, out = said(capsys).partition("is running already, as local job")
    assert out.endswith("; following it (Ctrl-C leaves it)\nstep 2/9  held-out 25.0%\n")


def test_a_run_that_was_killed_is_lost(room: Path):
    assert main(LAUNCH) == 0
    wait_for_step()
    folder, launch = launch_in(str(FOLDER))
    os.kill(int(launch.job), signal.SIGKILL)
    while local.ThisMachine().state(launch):
        time.sleep(0.02)
    assert state_of(folder, launch) is State.lost


def test_another_run_in_the_same_folder_is_refused_unless_it_is_meant(room: Path, capsys: pytest.CaptureFixture[str]):
    FOLDER.mkdir(parents=True)
    (FOLDER / "metrics.jsonl").write_text('{"step": 1}\n')
    (FOLDER / "config.yaml").write_text(yaml.safe_dump(settings(compose([*LAUNCH[2:], "learner.learning_rate=0.5"]))))
    assert main(LAUNCH) == 2
    rate = compose(LAUNCH[2:]).learner.learning_rate
    assert f"learner.learning_rate={rate}, and it was 0.5" in said(capsys)
    assert read_launch(FOLDER) is None
    assert main([*LAUNCH, "run.resume=true"]) == 0
    assert "continues runs/hop_search-seed0" in said(capsys)


def test_nothing_is_started_beside_a_job_that_cannot_be_asked(
    room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main(LAUNCH) == 0
    job = json.loads((FOLDER / "launch.json").read_text())["job"]

    class Silent(local.ThisMachine):
        def state(self, launch: object) -> State | None:
            raise LaunchError("nobody answers")

    with monkeypatch.context() as patch:
        patch.setattr(place, "place_of", lambda kind: Silent())
        patch.setattr("rl.jobs.control.place_of", lambda kind: Silent())
        assert main(LAUNCH) == 1
        assert "may still run, for it cannot be asked: nobody answers" in said(capsys)
        assert main(["jobs"]) == 0
        assert "unknown" in said(capsys)
    assert json.loads((FOLDER / "launch.json").read_text())["job"] == job


def test_a_dry_run_starts_and_writes_nothing(room: Path, capsys: pytest.CaptureFixture[str]):
    for where in ("local", "slurm"):
        assert main(["launch", where, "experiment=hop_search", "rollout.num_workers=1", "--dry-run"]) == 0
    assert "#SBATCH --job-name=hop-search-seed0-" in said(capsys)
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["launch", "lcoal"], 'launch="lcoal" is no choice of launch: there are kuberay, local, ray, slurm'),
        (
            ["launch", "experiment=hop_search"],
            "say where before the settings: grove launch local experiment=hop_search",
        ),
        (["launch", "local", "rollout.num_leavs=4"], "Did you mean rollout.num_leaves"),
        (["stop", "nothing"], '"nothing" is no run that `grove launch` started'),
        (["logs", "nothing"], "List those there are with: grove jobs"),
    ],
)
def test_a_mistake_is_told(room: Path, capsys: pytest.CaptureFixture[str], words: list[str], answer: str):
    assert main(words) == 2
    assert answer in said(capsys)
