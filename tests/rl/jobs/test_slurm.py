"""The batch script, and Slurm's programs in miniature: a job is a process group of this machine, a node is a name."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from conf.compose import compose
from conf.errors import ConfigError
from rl.jobs import control
from rl.jobs.plan import Plan, plan_launch
from rl.jobs.record import Ending, Launch, State, write_ending
from rl.jobs.slurm import Slurm, script

pytestmark = pytest.mark.slow

PROGRAMS = {
    # Slurm starts a job with the variables that --export names, and kills what is left of it.
    "sbatch": """
file=${@: -1}
log=$(sed -n 's/^#SBATCH --output=//p' "$file" | sed s/%j/77/)
names=$(sed -n 's/^#SBATCH --export=//p' "$file" | tr , ' ')
values=(SLURM_JOB_ID=77 SLURM_JOB_NODELIST=node[1-2] SLURM_CPUS_ON_NODE=2)
for name in $names; do values+=("$name=${!name}"); done
setsid env -i "${values[@]}" bash -c '
    bash "$1" & echo $! > ROOM/batch
    wait $!; echo $? > ROOM/code; kill -KILL 0
' _ "$file" >"$log" 2>&1 </dev/null &
echo $! > ROOM/pid
echo "77;cluster"
""",
    "squeue": """
[ -e ROOM/pid ] && kill -0 "$(cat ROOM/pid)" 2>/dev/null && echo RUNNING
exit 0
""",
    "scancel": """
echo "$@" >> ROOM/scancel
case $1 in
    --batch) kill -TERM "$(cat ROOM/batch)" ;;
    *) kill -KILL -- "-$(cat ROOM/pid)" ;;
esac
""",
    "scontrol": """
echo "$@" >> ROOM/scontrol
case $1 in show) printf 'node1\\nnode2\\n' ;; esac
""",
    "srun": """
for word; do case $word in --nodelist=*) node=${word#*=} ;; --*) ;; *) break ;; esac; done
while [[ $1 == --* ]]; do shift; done
case $1 in hostname) echo "10.0.0.${node#node}" ;; *) NODE=$node exec "$@" ;; esac
""",
    "fake_python": """
case "$*" in
    *"scripts start"*)
        echo "$NODE: ${*#*start }" >> ROOM/ray
        echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" > ROOM/auth
        exec sleep 60 ;;
    *"scripts status"*) sed 's/.*/ 1 node_x/' ROOM/ray ;;
    *rl.jobs.start*) trap 'echo saved; exit 130' TERM; env > ROOM/env; echo training; while :; do sleep 0.05; done ;;
esac
""",
}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder, with Slurm's programs first on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text.replace('ROOM', str(tmp_path))}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("MY_API_KEY", "very secret")
    monkeypatch.setenv("NOBODYS_BUSINESS", "1")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if (tmp_path / "pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def plan(room: Path, *overrides: str) -> Plan:
    words = ["launch=slurm", "experiment=hop_search", "launch.slurm.nodes=2", *overrides]
    cfg = compose([*words, f"launch.python={room / 'bin/fake_python'}", "launch.environment=[MY_API_KEY]"])
    return plan_launch(cfg, words, "", "slurm", room, datetime(2026, 11, 28))


def started(room: Path) -> Launch:
    launch = control.start(plan(room))
    while "training" not in (Path(launch.log).read_text() if Path(launch.log).exists() else ""):
        time.sleep(0.02)
    return launch


def ended(room: Path) -> str:
    """The exit code of the job, once it has ended."""
    while not (room / "code").exists():
        time.sleep(0.02)
    return (room / "code").read_text().strip()


def test_the_script_asks_for_what_the_settings_say(room: Path):
    asked = [
        *("launch.slurm.gpus_per_node=8", "launch.slurm.partition=big", "launch.slurm.account=us"),
        *("launch.slurm.options=['--qos=high']", "launch.slurm.setup=['module load cuda']", "launch.slurm.notice_s=60"),
        *("launch.slurm.memory_gib_per_node=500", "launch.slurm.cpus_per_node=96"),
    ]
    lines = script(plan(room, *asked), room).splitlines()
    for line in ("--nodes=2", "--gpus-per-node=8", "--partition=big", "--account=us", "--qos=high", "--time=1440"):
        assert f"#SBATCH {line}" in lines
    for line in ("--mem=500G", "--cpus-per-task=96", "--requeue", "--signal=B:USR1@60"):
        assert f"#SBATCH {line}" in lines
    assert "module load cuda" in lines
    assert "#SBATCH --exclusive" in script(plan(room), room).splitlines()


@pytest.mark.parametrize("nodes", [1, 3])
def test_bash_reads_the_script(room: Path, nodes: int):
    made = plan(room, f"launch.slurm.nodes={nodes}", "run.name='it is \"so\"'")
    text = script(made, room)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert ("ray.scripts" in text) == (nodes > 1)  # on one node the run starts Ray itself, on the loopback alone


def test_a_job_makes_its_cluster_trains_saves_when_it_is_stopped_and_is_not_queued_again(room: Path):
    launch = started(room)
    assert launch.job == "77"
    nodes = (room / "ray").read_text().splitlines()
    assert [line.partition(":")[0] for line in nodes] == ["node1", "node2"]
    assert "--head" in nodes[0] and "--address=10.0.0.1:6379" in nodes[1]
    assert (room / "auth").read_text() == "token 64\n"
    folder = room / "runs/hop_search-seed0"
    assert control.state_of(folder, launch) is State.running
    Slurm().stop(launch)
    assert ended(room) == "130"
    assert "saved" in Path(launch.log).read_text()
    assert "requeue" not in (room / "scontrol").read_text()
    assert control.state_of(folder, launch) is State.lost  # nobody wrote down how it ended: this run was a fake
    write_ending(folder, Ending(exit_code=130, at=0.0, pid=1))
    assert control.state_of(folder, launch) is State.stopped


def test_a_job_that_slurm_warns_saves_and_is_queued_again(room: Path):
    started(room)
    os.kill(int((room / "batch").read_text()), signal.SIGUSR1)
    assert ended(room) == "130"
    assert "requeue 77" in (room / "scontrol").read_text()


def test_a_job_is_given_the_variables_that_are_named_and_its_script_holds_no_value(room: Path):
    started(room)
    seen = (room / "env").read_text()
    assert "MY_API_KEY=very secret" in seen and "NOBODYS_BUSINESS" not in seen
    written = [path for path in (room / "runs").rglob("*") if path.is_file() and b"very secret" in path.read_bytes()]
    assert written == []


def test_without_slurm_it_says_where_to_go(room: Path):
    (room / "bin/sbatch").unlink()
    with pytest.raises(ConfigError, match=r"no \"sbatch\" on this machine.*login node.*--dry-run"):
        control.start(plan(room))
