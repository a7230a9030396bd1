"""Batch jobs of Slurm, asked by its own programs."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from conf.errors import LaunchError
from rl.jobs.follow import followed
from rl.jobs.place import ask, require_program
from rl.jobs.plan import Plan
from rl.jobs.record import Launch, State
from rl.jobs.template import filled
from rl.jobs.versions import pinned_versions, to_text

ALWAYS_PASSED = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER")
STOP_FILE = "launch_stop"
"""In the run folder: the job is to end, and not to be queued again."""
STATES = {"PENDING": State.waiting, "CONFIGURING": State.waiting, "REQUEUED": State.waiting, "RUNNING": State.running}
LIVE = ("COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "REQUEUE_HOLD", "SPECIAL_EXIT")
POLL_S = 1.0
GRACE_S = 15.0


class Slurm:
    """launch.kind=slurm"""

    def shown(self, plan: Plan) -> str:
        """The batch script."""
        return script(plan, Path.cwd())

    def start(self, plan: Plan) -> Launch:
        """Write the script into the run folder and submit it."""
        require_program("sbatch", "Give the command on a login node, or see the script with --dry-run.")
        (plan.here / "logs").mkdir(parents=True, exist_ok=True)
        (plan.here / STOP_FILE).unlink(missing_ok=True)
        file = plan.here / "launch.sh"
        file.write_text(self.shown(plan), encoding="utf-8")
        said = ask(["sbatch", "--parsable", str(file)], plan.launch.answer_limit_s)
        job = said.strip().splitlines()[-1].partition(";")[0] if said.strip() else ""
        if not job.isdigit():
            raise LaunchError(f'sbatch said "{said.strip()}", which is no number of a job, so it could not be watched.')
        return Launch(kind="slurm", job=job, run_dir=plan.there, log=str(plan.here / "logs" / f"slurm-{job}.log"))

    def state(self, launch: Launch) -> State | None:
        """As squeue has it; None once the job has left the queue."""
        try:
            said = ask(["squeue", "--noheader", "--format=%T", f"--jobs={launch.job}"], launch.answer_limit_s)
        except LaunchError as error:
            if "Invalid job id" in str(error):
                return None
            raise
        word = said.strip().partition("\n")[0]
        return STATES.get(word, State.running if word in LIVE else None)

    def stop(self, launch: Launch) -> None:
        """SIGTERM to the script, which has the run save; scancel after the limit."""
        (Path(launch.run_dir) / STOP_FILE).touch()
        if self.state(launch) is State.running:
            ask(["scancel", "--batch", "--signal=TERM", launch.job], launch.answer_limit_s)
            deadline = time.monotonic() + launch.stop_limit_s
            while self.state(launch) is not None and time.monotonic() < deadline:
                time.sleep(POLL_S)
        if self.state(launch) is None:
            return
        ask(["scancel", launch.job], launch.answer_limit_s)
        deadline = time.monotonic() + GRACE_S + launch.answer_limit_s
        while self.state(launch) is not None:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"job {launch.job} is still in the queue after scancel. Ask: squeue --jobs={launch.job}"
                )
            time.sleep(POLL_S)

    def log(self, launch: Launch, *, follow: bool) -> Iterator[str]:
        """The file that the script's output goes to."""
        return followed(Path(launch.log), is_over=lambda: not follow or self.state(launch) is None)


def script(plan: Plan, folder: Path) -> str:
    """The batch script of a plan; `folder` is where the job works."""
    launch = plan.launch
    start = plan.start_words(launch.python, to_text(pinned_versions()))
    return filled(
        launch.slurm.template,
        "slurm.sh.jinja",
        {
            "job": plan.job,
            "command": plan.command,
            "slurm": launch.slurm,
            "folder": folder,
            "log": plan.here / "logs" / "slurm-%j.log",
            "names": [*(name for name in ALWAYS_PASSED if name in os.environ), *launch.environment],
            "python": shlex.quote(launch.python),
            "start": shlex.join(start),
            "stop_file": shlex.quote(str(Path(plan.there) / STOP_FILE)),
        },
    )
