"""What each place that runs jobs can do, and how programs of other people are asked."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Protocol

from conf.errors import ConfigError, LaunchError, WaitTimeout
from conf.schema import LaunchKind
from rl.jobs.plan import Plan
from rl.jobs.record import Launch, State


class Place(Protocol):
    """A kind of place: this machine, a Ray cluster, Slurm, Kubernetes."""

    def shown(self, plan: Plan) -> str:
        """What `start` would hand over, for --dry-run."""
        ...

    def start(self, plan: Plan) -> Launch:
        """Start the job.

        Raises: LaunchError when the place refuses or does not answer.
        """
        ...

    def state(self, launch: Launch) -> State | None:
        """How the job is doing; None where the place no longer knows it."""
        ...

    def stop(self, launch: Launch) -> None:
        """Have it save and end, and return once it has; kill it when it takes longer than its limit."""
        ...

    def log(self, launch: Launch, *, follow: bool) -> Iterator[str]:
        """What it printed, in pieces; with `follow` also what it still prints, until it ends."""
        ...


def place_of(kind: str) -> Place:
    """The place of a kind of launch."""
    match LaunchKind[kind]:
        case LaunchKind.local:
            from rl.jobs.local import ThisMachine

            return ThisMachine()
        case LaunchKind.ray:
            from rl.jobs.ray_cluster import RayCluster

            return RayCluster()
        case LaunchKind.slurm:
            from rl.jobs.slurm import Slurm

            return Slurm()
        case LaunchKind.kuberay:
            from rl.jobs.kuberay import KubeRay

            return KubeRay()


def require_program(name: str, what_then: str) -> None:
    """Raises: ConfigError when a program is not on PATH."""
    if shutil.which(name) is None:
        raise ConfigError(f'there is no "{name}" on this machine, which hands the job over. {what_then}')


def ask(words: Sequence[str], limit_s: float, *, text: str = "") -> str:
    """What a program prints.

    Args:
        words: its command line.
        text: for its standard input.
    Raises: LaunchError with its own words when it fails; WaitTimeout when it does not end in time.
    """
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise WaitTimeout(
            f"`{' '.join(words[:3])}` did not answer within launch.answer_limit_s={limit_s:g}. Is what it talks to up?"
        ) from error
    except OSError as error:
        raise LaunchError(
            f"`{words[0]}` cannot be run ({error}): the job can be neither started nor watched."
        ) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or "no word of why"
        raise LaunchError(f"`{' '.join(words[:3])}` failed with {done.returncode}: {said}")
    return done.stdout
