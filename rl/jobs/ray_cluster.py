"""Jobs of a Ray cluster that is up already, handed to the job server of its head."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from conf.errors import LaunchError, first_line
from rl.jobs import passed
from rl.jobs.plan import Plan
from rl.jobs.record import Launch, State
from rl.jobs.upload import find_upload, write_archive
from rl.jobs.versions import pinned_versions, to_text
from rollout.patience import wait_for

STATES = {
    JobStatus.PENDING: State.waiting,
    JobStatus.RUNNING: State.running,
    JobStatus.SUCCEEDED: State.finished,
    JobStatus.FAILED: State.failed,
    JobStatus.STOPPED: State.stopped,
}
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Ray's client prefers these to the address that it is given."""
TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray's client that each set a level of their own."""
POLL_S = 0.5
NO_AGENT = "No available agent"
"""What the job server answers while a cluster comes up."""
AGENT_LIMIT_S, AGENT_PAUSE_S = 120.0, 1.0
"""Longest wait for an agent, and between two tries."""
GRACE_S = 15.0
"""What the job server may take beyond the limit that it was given to stop a job."""


class RayCluster:
    """launch.kind=ray"""

    def shown(self, plan: Plan) -> str:
        """The job server, what is uploaded to it, and the command."""
        upload = find_upload(Path.cwd(), plan.launch.ray)
        passes = f"passes {', '.join(plan.launch.environment) or 'no environment variables'}"
        return "\n".join([f"submits to {plan.launch.ray.address}", *upload.lines(), passes, self._entrypoint(plan)])

    def start(self, plan: Plan) -> Launch:
        """Upload the working folder and submit the job."""
        launch = plan.launch
        upload = find_upload(Path.cwd(), launch.ray)
        client = _client(launch.ray.address, launch.answer_limit_s)
        variables = {
            "PYTHONUNBUFFERED": "1",
            # Ray's own 3 s would end a run in the middle of its checkpoint.
            "RAY_JOB_STOP_WAIT_TIME_S": str(launch.stop_limit_s),
        }
        for line in upload.lines():
            print(line)
        with tempfile.TemporaryDirectory() as room, _told(launch.ray.address):
            if launch.environment:
                variables[passed.NAME_VARIABLE] = _pass(client, {name: os.environ[name] for name in launch.environment})
            archive = Path(room) / "working_dir.zip"
            write_archive(upload, archive)
            job = _submitted(
                client,
                entrypoint=self._entrypoint(plan),
                submission_id=plan.job,
                runtime_env={"working_dir": str(archive), "env_vars": variables},
            )
        return Launch(kind="ray", job=job, run_dir=plan.there, address=launch.ray.address)

    def state(self, launch: Launch) -> State | None:
        """As the job server has it; None after a new start of the cluster, which forgets its jobs."""
        client = _client(launch.address, launch.answer_limit_s)
        try:
            return STATES[client.get_job_status(launch.job)]
        except RuntimeError as error:
            if "404" in str(error):
                return None
            raise LaunchError(
                f"the job server at {launch.address} does not know how {launch.job} is: {error}"
            ) from error

    def stop(self, launch: Launch) -> None:
        """SIGTERM by way of the job server, which kills the job after launch.stop_limit_s."""
        with _told(launch.address):
            client = _client(launch.address, launch.answer_limit_s)
            client.stop_job(launch.job)
            deadline = time.monotonic() + launch.stop_limit_s + GRACE_S
            while not client.get_job_status(launch.job).is_terminal():
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"{launch.job} runs on {GRACE_S:.0f} s after the job server at {launch.address} should have "
                        f"killed it. Look at its node; `ray job stop` may help."
                    )
                time.sleep(POLL_S)

    def log(self, launch: Launch, *, follow: bool) -> Iterator[str]:
        """The driver's output, from the job server."""
        with _told(launch.address):
            client = _client(launch.address, launch.answer_limit_s)
            if follow:
                yield from _tailed(client, launch.job)
            else:
                yield client.get_job_logs(launch.job)

    def _entrypoint(self, plan: Plan) -> str:
        # exec: the shell of the job server would be one more process between a signal and the run
        return f"exec {shlex.join(plan.start_words(plan.launch.python, to_text(pinned_versions())))}"


class _Client(JobSubmissionClient):
    """Ray's client, which by itself would wait for an answer for ever."""

    def __init__(self, address: str, limit_s: float):
        self._limit_s = limit_s
        super().__init__(address)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=self._limit_s, **options)


def _client(address: str, limit_s: float) -> _Client:
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _without(ADDRESS_VARIABLES):
            return _Client(address, limit_s)
    except Exception as error:  # of the connection, of the token, or set off by what another server answers
        raise LaunchError(
            f"no job server of Ray answers at launch.ray.address={address} ({first_line(error)}): the run can "
            f"be neither started nor watched. Is the cluster up, with its dashboard, and is RAY_AUTH_TOKEN its own? "
            f"From elsewhere: ssh -L 8265:127.0.0.1:8265 HEAD."
        ) from error


def _submitted(client: Any, **job: Any) -> str:
    """The job's name. A cluster that has just come up has no agent yet that would take it: that is waited for."""

    def taken(limit_s: float) -> str | None:
        started = time.monotonic()
        while time.monotonic() - started < limit_s:
            try:
                return client.submit_job(**job)
            except RuntimeError as error:
                if NO_AGENT not in str(error):
                    raise
            time.sleep(AGENT_PAUSE_S)
        return None

    return wait_for(taken, limit_s=AGENT_LIMIT_S, what="an agent of the cluster that takes the job")


@contextlib.contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    """Environment variables taken out for a while."""
    values = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """Errors of the job server, and of the way to it, as ours."""
    try:
        yield
    except LaunchError:
        raise
    except (RuntimeError, OSError) as error:
        raise LaunchError(f"the job server at {address} refuses: {error}") from error


def _pass(client: _Client, environment: dict[str, str]) -> str:
    """Put variables into the memory of the head; returns their name there."""
    name = passed.new_name()
    answer = client._do_request("PUT", f"/api/packages/gcs/{name}", data=passed.to_bytes(environment))
    if answer.status_code != 200:
        raise LaunchError(
            f"the head would not take the variables of launch.environment (status {answer.status_code}), and Ray's own "
            f"way would write them to its logs. Set them where the nodes are started instead."
        )
    return name


def _tailed(client: _Client, job: str) -> Iterator[str]:
    pieces = client.tail_job_logs(job)

    async def next_piece() -> str | None:
        return await anext(pieces, None)

    with asyncio.Runner() as runner:
        while (piece := runner.run(next_piece())) is not None:
            yield piece
