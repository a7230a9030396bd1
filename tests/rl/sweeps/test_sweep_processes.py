"""Sweeps of real processes, killed half-way and resumed; first with members that train nothing, then with real ones."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ports import free_port

from rl.sweeps.record import Status, SweepRecord, read_record

pytestmark = pytest.mark.slow

SHORT = [sys.executable, str(Path(__file__).with_name("short_members.py")), "sweep"]
MEMBERS = int(os.environ.get("GROVE_SWEEP_MEMBERS", "3"))
"""Of the real sweep; 12 takes minutes."""


def until(true: Callable[[], bool], process: subprocess.Popen[str], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def started(command: list[str], log: Path) -> subprocess.Popen[str]:
    with log.open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finished(folder: Path) -> int:
    return read_record(folder).count(Status.finished) if (folder / "sweep.json").exists() else 0


def test_twelve_members_one_poisoned_killed_half_way_and_resumed(tmp_path: Path):
    folder = tmp_path / "sweep"
    command = [*SHORT, f"sweep.dir={folder}", "sweep.parallel=3", "rollout.num_workers=1", "seed=range(1,13)"]
    first = started(command, tmp_path / "log")
    until(lambda: finished(folder) >= 5, first, 60)
    first.kill()
    first.wait()
    left = read_record(folder)  # what the kill left: some members finished, up to three in the middle
    done = {each.name for each in left.members if each.status is Status.finished}
    assert 5 <= len(done) < 11 and left.count(Status.running) >= 1
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    record = read_record(folder)
    assert (record.count(Status.finished), record.count(Status.failed)) == (11, 1)
    poisoned = next(each for each in record.members if each.status is Status.failed)
    assert poisoned.name == "seed5" and poisoned.tries == 2
    assert poisoned.reason == "ValueError: this seed is poisoned (exit code 1)"
    assert "11 finished, 1 failed" in second.stdout
    # nothing twice: a finished member was not started again, and one in the middle went on from its checkpoint
    starts = Counter(lines(folder / "starts.txt"))
    assert all(starts[name] == 1 for name in done)
    assert max(Counter(lines(folder / "ticks.txt")).values()) == 1
    assert len(lines(folder / "ticks.txt")) == 11 * 4


def test_ctrl_c_stops_members_with_their_checkpoints_and_says_how_to_go_on(tmp_path: Path):
    folder = tmp_path / "sweep"
    command = [*SHORT, f"sweep.dir={folder}", "sweep.parallel=2", "rollout.num_workers=1", "seed=1,2,3,4"]
    process = started(command, tmp_path / "log")
    until(lambda: len(lines(folder / "ticks.txt")) >= 3, process, 60)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert "members; they write their checkpoints" in (tmp_path / "log").read_text()
    assert read_record(folder).count(Status.stopped, Status.finished) >= 2
    assert read_record(folder).count(Status.running) == 0


def test_a_sweep_in_use_is_not_run_twice(tmp_path: Path):
    folder = tmp_path / "sweep"
    command = [*SHORT, f"sweep.dir={folder}", "rollout.num_workers=1", "seed=1,2,3,4"]
    process = started(command, tmp_path / "log")
    until(lambda: bool(lines(folder / "starts.txt")), process, 60)
    try:
        again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert again.returncode == 1 and "another process runs the sweep in" in again.stderr
    finally:
        process.terminate()
        process.wait(timeout=30)


TRAP = """
def trap(step, number):
    if number == 1:
        raise ValueError("poisoned")
    return 0.0
"""


def members(folder: Path, room: Path) -> list[str]:
    """A sweep of small runs, of nothing yet."""
    cheap = ["experiment=hop_search", "rollout.engine=transformers", "rollout.num_workers=1", "tracker=disabled"]
    short = ["run.num_steps=1", "run.eval_prompts=8", "rollout.prompts_per_step=2", "model.warm_start.num_steps=20"]
    places = [f"sweep.dir={folder}", f"model.warm_start.cache_dir={room / 'warm_start'}", "sweep.max_retries=0"]
    return [sys.executable, "-m", "rl.cli", "train", "-m", *cheap, *short, *places]


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_real_sweep_with_a_poisoned_reward_killed_half_way_and_resumed(tmp_path: Path):
    (tmp_path / "trap.py").write_text(TRAP)
    folder = tmp_path / "sweep"
    trap = [f"rewards.sources.trap.fn={tmp_path / 'trap.py'}:trap", "rewards.sources.trap.signal=unused"]
    varied = f"rewards.sources.trap.args.number=range(0,{MEMBERS})"
    command = [*members(folder, tmp_path), *trap, varied]
    first = started(command, tmp_path / "log")
    until(lambda: finished(folder) >= MEMBERS // 2, first, 1000)
    first.kill()
    first.wait()
    done = {each.name: changed(folder, each.name) for each in read_record(folder).members if each.summary}
    second = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    record = read_record(folder)
    assert second.returncode == 1, second.stdout + second.stderr
    assert (record.count(Status.finished), record.count(Status.failed)) == (MEMBERS - 1, 1), told(record)
    assert "poisoned" in record.members[1].reason
    assert {name: changed(folder, name) for name in done} == done  # not touched again
    rows = (folder / record.members[0].name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 1]
    compared = [sys.executable, "-m", "rl.cli", "compare", str(folder)]
    said = subprocess.run(compared, capture_output=True, text=True, timeout=100, check=True).stdout
    assert "number1 is left out: it is failed" in said.replace("Number1", "number1")
    assert {"compare.html", "compare.png", "compare.json"} <= {each.name for each in folder.iterdir()}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a Ray cluster that runs already."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray, port = str(Path(sys.executable).with_name("ray")), free_port()
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp", ignore_cleanup_errors=True) as room:
        place = [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={room}", "--include-dashboard=false"]
        head = started(
            [ray, "start", "--head", "--block", "--num-cpus=2", *place, f"--dashboard-agent-listen-port={free_port()}"],
            Path(room) / "log",
        )
        try:
            asked = [ray, "status", f"--address=127.0.0.1:{port}"]
            until(lambda: "/2.0 CPU" in subprocess.run(asked, capture_output=True, text=True).stdout, head, 60)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(timeout=60)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_members_share_a_ray_cluster_that_runs_already(tmp_path: Path, cluster: str):
    folder = tmp_path / "sweep"
    joined = ["cluster=existing", f"cluster.address={cluster}", "sweep.parallel=2", "learner.learning_rate=1e-5,1e-4"]
    sweep = started([*members(folder, tmp_path), *joined], tmp_path / "log")
    until(lambda: (folder / "sweep.json").exists() and read_record(folder).count(Status.running) == 2, sweep, 100)
    begun = [folder / each.name / "metrics.jsonl" for each in read_record(folder).members]
    until(lambda: all(each.exists() for each in begun), sweep, 200)
    assert "raylet" not in {each.name() for each in psutil.Process(sweep.pid).children(recursive=True)}
    assert sweep.wait(timeout=400) == 0, (tmp_path / "log").read_text() + told(read_record(folder))
    assert finished(folder) == 2


def changed(folder: Path, name: str) -> float:
    return (folder / name / "metrics.jsonl").stat().st_mtime


def told(record: SweepRecord) -> str:
    return "\n".join(f"{each.name} {each.status.value} {each.reason}" for each in record.members)
