"""Workers are killed while a run trains: it goes on, and comes to the same numbers as if nobody had touched it.

GROVE_CHAOS_STEPS=50 python -m pytest tests/rl/test_chaos.py      (make chaos)
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from whole_runs import WARM_START
from whole_runs import steady_metrics as metrics

from rl.checkpoint import newest
from rl.record import read_trees
from rl.run_folder import RunFolder
from rollout.tree import Tree

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = int(os.environ.get("GROVE_CHAOS_STEPS", "8"))
KILL_EVERY = 5 if STEPS >= 20 else 3
SMALL = [
    *("experiment=hop_search", "run.eval_prompts=0", "run.checkpoint_every_steps=2", "rollout.prompts_per_step=6"),
    *(*WARM_START, "rollout.max_worker_restarts=1000", f"run.num_steps={STEPS}"),
]
long = pytest.mark.skipif(STEPS < 20, reason="takes minutes: make chaos")


BREVITY = """
def brevity(step, question):
    return min(1.0, len(question) / max(1, len(step.action_text)))
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("chaos")
    (room / "brevity.py").write_text(BREVITY)
    return room


def words_of(room: Path, folder: Path, *overrides: str) -> list[str]:
    """A run's command line."""
    reward = f"rewards.sources.brevity={{fn: {room}/brevity.py:brevity, weight: 0.2}}"
    return [sys.executable, "-m", "rl.cli", "train", *SMALL, reward, f"run.dir={folder}", *overrides]


@pytest.fixture(scope="module")
def calm(room: Path) -> Path:
    """A run that nobody disturbs."""
    return trained(room, "calm")


def trained(
    room: Path, name: str, *overrides: str, meanwhile: Callable[[psutil.Process, Path], None] | None = None
) -> Path:
    folder = room / name
    command = words_of(room, folder, *overrides)
    log = room / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            if meanwhile is not None:
                meanwhile(psutil.Process(process.pid), folder)
            assert process.wait(timeout=1500) == 0, log.read_text()[-4000:]
        finally:
            process.kill()
            process.wait(timeout=60)
    return folder


def recorded(folder: Path, step: int) -> list[Tree]:
    return [each.tree for each in read_trees(folder / "trees" / f"step_{step:06d}.jsonl.gz")]


def kill_workers(process: psutil.Process, folder: Path) -> None:
    """SIGKILL to one rollout worker after every few steps, in turn, in the middle of the next step."""
    number = 0
    for step in range(1, STEPS, KILL_EVERY):
        while len(metrics(folder)) < step:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.02)
        workers = sorted(
            (each for each in process.children(recursive=True) if "RolloutWorker" in "".join(each.cmdline())),
            key=lambda each: each.pid,
        )
        if workers:
            os.kill(workers[number % len(workers)].pid, signal.SIGKILL)
            number += 1


@long  # the run whose every part is killed loses a worker too
def test_a_run_whose_workers_are_killed_equals_the_undisturbed_one(room: Path, calm: Path):
    stormy = trained(room, "stormy", meanwhile=kill_workers)
    summary = json.loads((stormy / "summary.json").read_text())
    assert summary["worker_restarts"] >= (STEPS - 1) // KILL_EVERY
    assert metrics(stormy) == metrics(calm)
    for step in range(1, STEPS + 1):
        trees = [
            [each.tree for each in read_trees(folder / "trees" / f"step_{step:06d}.jsonl.gz")]
            for folder in (calm, stormy)
        ]
        for one, other in zip(*trees, strict=True):  # none lost, none twice
            assert one.prompt == other.prompt
            assert [node.action_ids for node in one.nodes] == [node.action_ids for node in other.nodes]


STORM = [
    (1, "rollout worker"),
    (2, "reward process"),
    (3, "wandb"),
    (4, "reward service"),
    (5, "learner"),
    (6, "driver"),
    (7, "raylet"),
]
"""After which step which part is killed. The last three end the run's process, which is started again."""

PARTS: dict[str, Callable[[psutil.Process], list[psutil.Process]]] = {
    "rollout worker": lambda run: named(run, "ray::RolloutWorker"),
    "reward process": lambda run: [each for actor in named(run, "ray::RewardActor") for each in actor.children()],
    "wandb": lambda run: named(run, "wandb-core"),
    "reward service": lambda run: named(run, "ray::RewardActor"),
    "learner": lambda run: named(run, "ray::LearnerActor"),
    "driver": lambda run: named(run, "__train"),
    "raylet": lambda run: named(run, "raylet/raylet"),
    "engine core": lambda run: [
        core for each in named(run, "ray::RolloutWorker") for core in named(each, "spawn_main")
    ],
}


def named(run: psutil.Process, words: str) -> list[psutil.Process]:
    """Processes of a run whose command line contains the words, oldest first."""
    found = []
    for each in run.children(recursive=True):
        try:
            if words in " ".join(each.cmdline()):
                found.append((each.create_time(), each))
        except psutil.NoSuchProcess:
            continue
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def kill_parts(storm: list[tuple[int, str]]) -> Callable[[psutil.Process, Path], None]:
    """SIGKILL to each part, once as many steps are through."""

    def kill(run: psutil.Process, folder: Path) -> None:
        for step, part in storm:
            while len(metrics(folder)) < step or not PARTS[part](run):
                assert run.is_running() and run.status() != psutil.STATUS_ZOMBIE, f"the run ended before {part}"
                time.sleep(0.02)
            PARTS[part](run)[-1].kill()

    return kill


def test_a_run_whose_every_part_is_killed_once_equals_the_undisturbed_one(room: Path, calm: Path):
    stormy = trained(room, "stormy parts", "run.num_steps=8", meanwhile=kill_parts(STORM))
    assert metrics(stormy) == metrics(calm)[:8]
    assert RunFolder(calm).read_restarts() == [] and len(RunFolder(stormy).read_restarts()) == 3
    told = (room / "stormy parts.log").read_text()
    assert "the reward service was lost" in told and "rollout worker" in told and "starting another" in told


@long
def test_an_engines_own_process_may_be_killed(room: Path, calm: Path):
    settings = ["rollout.engine_processes=true", "rollout.num_workers=1", "run.num_steps=3"]
    stormy = trained(room, "stormy engine", *settings, meanwhile=kill_parts([(1, "engine core")]))
    assert metrics(stormy) == metrics(calm)[:3]
    assert json.loads((stormy / "summary.json").read_text())["worker_restarts"] == 1


@long
def test_a_learners_node_that_goes_is_waited_for_and_the_run_goes_on_from_its_checkpoint(room: Path):
    with pytest.MonkeyPatch.context() as patch:
        # Else every other Ray of this machine would be told that here is the cluster to join.
        patch.setattr("ray._private.utils.write_ray_address", lambda *_: None)
        cluster = Cluster()
        nodes = [add_node(cluster, number) for number in (2, 3)]
    two_nodes = ["cluster=existing", f"cluster.address={cluster.address}", "cluster.learner_nodes=2"]
    ranks = ["learner.num_processes=2", "learner.num_threads=1", "rollout.num_workers=2", "run.num_steps=5"]
    before: list[dict[str, float]] = []

    def take_one_away(run: psutil.Process, folder: Path) -> None:
        while len(before) < 3:
            assert run.is_running() and run.status() != psutil.STATUS_ZOMBIE, "the run ended before its node was lost"
            before[:] = metrics(folder)
            time.sleep(0.02)
        cluster.remove_node(nodes[1], allow_graceful=False)
        while "(cluster.nodes_timeout_s) for room" not in (room / "node.log").read_text():
            assert run.is_running() and run.status() != psutil.STATUS_ZOMBIE, (room / "node.log").read_text()[-4000:]
            time.sleep(0.1)
        add_node(cluster, 3)

    try:
        folder = trained(room, "node", *two_nodes, *ranks, meanwhile=take_one_away)
    finally:
        cluster.shutdown()
    assert len(RunFolder(folder).read_restarts()) == 1
    # Steps after the last checkpoint, of step 2 or later, were done twice.
    assert metrics(folder)[: len(before)] == before and len(metrics(folder)) == 5


def add_node(cluster: Cluster, number: int) -> Any:
    """A Ray node of one core, with an address of its own."""
    kept: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    return cluster.add_node(**kept, node_ip_address=f"127.0.0.{number}")


def test_batches_that_grow_ahead_are_never_older_than_allowed_and_survive_a_kill(room: Path):
    steps = 20 if STEPS >= 20 else 5
    folder = trained(
        room, "ahead", "rollout.max_staleness=1", f"run.num_steps={steps}", "tracker=disabled", meanwhile=kill_workers
    )
    rows = [row for row in metrics(folder) if "rollout/staleness_max" in row]
    assert len(rows) == steps
    assert {row["rollout/staleness_max"] for row in rows} <= {0, 1}
    assert any(row["rollout/stale_share"] > 0 for row in rows)
    ids = [tree.prompt.id for step in range(1, steps + 1) for tree in recorded(folder, step)]
    assert len(ids) == len(set(ids)) == 6 * steps


DISK_MIB = 100
LITTLE_BYTES = 400_000
"""Room for the trees and metrics of some steps and for no checkpoint."""
IN_A_DISK_OF_ITS_OWN = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = [*IN_A_DISK_OF_ITS_OWN, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fill(ballast: Path, but_bytes: int) -> None:
    """Leave so much room on the disk, or none."""
    with ballast.open("ab") as file:
        file.truncate(0)
        disk = os.statvfs(ballast)
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - but_bytes)


@long
@pytest.mark.skipif(not can_mount(), reason="no disk can be mounted in a namespace here")
def test_a_run_whose_disk_fills_goes_on_when_there_is_room_and_equals_the_undisturbed_one(room: Path, calm: Path):
    disk, log = room / "disk", room / "full.log"
    disk.mkdir()
    train = shlex.join(words_of(room, disk / "run", "run.num_steps=8"))
    script = f"mount -t tmpfs -o size={DISK_MIB}m tmpfs {disk} && {train}; echo $? >{disk}/code; sleep 1500"
    with log.open("wb") as output:
        command = [*IN_A_DISK_OF_ITS_OWN, "sh", "-c", script]
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        seen = Path(f"/proc/{run.pid}/root{disk}")  # the disk is mounted for the run alone

        def wait_until(come: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 600
            while not come():
                assert time.monotonic() < deadline and run.poll() is None, log.read_text()[-4000:]
                time.sleep(0.02)

        wait_until((seen / "run/checkpoints/step_000002").exists)
        fill(seen / "ballast", LITTLE_BYTES)
        wait_until(lambda: "training goes on without a checkpoint" in log.read_text())
        fill(seen / "ballast", 0)
        wait_until(lambda: "s for room" in log.read_text())
        (seen / "ballast").unlink()
        wait_until((seen / "code").exists)
        assert (seen / "code").read_text() == "0\n", log.read_text()[-4000:]
        shutil.copytree(seen / "run", room / "full")
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait(timeout=60)
    assert metrics(room / "full") == metrics(calm)[:8]
    saved = newest(room / "full" / "checkpoints")
    assert saved is not None and saved.step == 8
    assert RunFolder(room / "full").read_restarts() == []
