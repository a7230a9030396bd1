"""RayJobs of Kubernetes, whose KubeRay operator makes a Ray cluster for each; asked by kubectl."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import yaml

from conf.errors import LaunchError
from rl.jobs.place import ask, require_program
from rl.jobs.plan import Plan
from rl.jobs.record import Launch, State
from rl.jobs.template import filled
from rl.jobs.versions import pinned_versions, to_text

STATES = {
    "PENDING": State.waiting,
    "RUNNING": State.running,
    "SUCCEEDED": State.finished,
    "FAILED": State.failed,
    "STOPPED": State.stopped,
}
POLL_S = 1.0
GRACE_S = 30.0
JOB_SERVER = "http://127.0.0.1:8265"
"""As the head's own pod sees it."""


class KubeRay:
    """launch.kind=kuberay"""

    def shown(self, plan: Plan) -> str:
        """The manifest."""
        return manifest(plan)

    def start(self, plan: Plan) -> Launch:
        """Have kubectl create the RayJob."""
        require_program("kubectl", "Install it and log in to your cluster, or see the manifest with --dry-run.")
        namespace = plan.launch.kuberay.namespace
        ask(["kubectl", "create", "--filename=-"], plan.launch.answer_limit_s, text=self.shown(plan))
        return Launch(kind="kuberay", job=plan.job, run_dir=plan.there, address=namespace)

    def state(self, launch: Launch) -> State | None:
        """As the RayJob's status has it; None when it is gone."""
        found = _status(launch)
        return None if found is None else state_in(found)

    def stop(self, launch: Launch) -> None:
        """`ray job stop` in the head's pod, so that the run saves while all pods are there; then the RayJob goes."""
        found = _status(launch)
        if found is None:
            return
        if state_in(found) is State.running:
            self._save(launch, str(found.get("rayClusterName", "")))
        if state_in(_status(launch) or {}).is_live:
            words = ["delete", "rayjob", launch.job, f"--timeout={launch.stop_limit_s}s"]
            _kubectl(launch, words, launch.stop_limit_s + GRACE_S)

    def log(self, launch: Launch, *, follow: bool) -> Iterator[str]:
        """Of the pod that submits the job and prints what the job prints."""
        require_program("kubectl", "The run's output is in its pods.")
        words = ["logs", f"--selector=job-name={launch.job}", "--tail=-1", *(["--follow"] if follow else [])]
        command = ["kubectl", f"--namespace={launch.address}", *words]
        if not follow:
            yield ask(command, launch.answer_limit_s)
            return
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None, "it was asked for"
            try:
                yield from process.stdout
            finally:
                process.terminate()

    def _save(self, launch: Launch, cluster: str) -> None:
        selector = f"--selector=ray.io/cluster={cluster},ray.io/node-type=head"
        pods = _kubectl(launch, ["get", "pods", selector, "--output=name"], launch.answer_limit_s).split()
        if not pods:
            raise LaunchError(
                f"the head of {launch.job} has no pod, so the run cannot be asked to save. Wait and retry."
            )
        save = ["exec", pods[0], "--", "ray", "job", "stop", f"--address={JOB_SERVER}", launch.job]
        _kubectl(launch, save, launch.stop_limit_s + GRACE_S)
        deadline = time.monotonic() + launch.stop_limit_s
        while state_in(_status(launch) or {}) is State.running and time.monotonic() < deadline:
            time.sleep(POLL_S)


def manifest(plan: Plan) -> str:
    """The RayJob of a plan, as YAML. Keys come from the Secret that launch.kuberay.secret_name names."""
    launch = plan.launch
    runtime_env: dict[str, Any] = {
        "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(launch.stop_limit_s)}
    }
    if launch.kuberay.working_dir:
        runtime_env["working_dir"] = launch.kuberay.working_dir
    start = plan.start_words(launch.python, to_text(pinned_versions()))
    return filled(
        launch.kuberay.template,
        "rayjob.yaml.jinja",
        {
            "job": plan.job,
            "command": plan.command,
            "kuberay": launch.kuberay,
            "names": launch.environment,
            "start": f"exec {shlex.join(start)}",
            "save": f"ray job stop --address={JOB_SERVER} {plan.job} || true",
            "runtime_env": yaml.safe_dump(runtime_env),
            "ray_version": metadata.version("ray"),
            "stop_limit_s": launch.stop_limit_s,
        },
    )


def state_in(status: dict[str, Any]) -> State:
    """What a RayJob's status says."""
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if deployment == "Retrying":
        return State.waiting
    if deployment == "Failed" and job not in ("SUCCEEDED", "STOPPED"):
        return State.failed
    if deployment == "Suspended":
        return State.stopped
    return STATES.get(job, State.waiting)


def _status(launch: Launch) -> dict[str, Any] | None:
    try:
        said = _kubectl(launch, ["get", "rayjob", launch.job, "--output=json"], launch.answer_limit_s)
    except LaunchError as error:
        if "NotFound" in str(error):
            return None
        raise
    try:
        return json.loads(said).get("status", {})
    except ValueError as error:
        raise LaunchError(f"kubectl answered no JSON about {launch.job}: {said[:200]}") from error


def _kubectl(launch: Launch, words: list[str], limit_s: float) -> str:
    return ask(["kubectl", f"--namespace={launch.address}", *words], limit_s)
