"""The manifest, and kubectl in miniature: it remembers what it was given and answers a status."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.compose import compose
from conf.errors import ConfigError, LaunchError
from rl.jobs import control
from rl.jobs.kuberay import KubeRay, manifest, state_in
from rl.jobs.plan import Plan, plan_launch
from rl.jobs.record import State

# Fields of ray.io/v1 that KubeRay's API reference lists; an unknown one is dropped or refused by the API server.
JOB_FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector"),
    *("submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode"),
    *("entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished"),
    *("shutdownAfterJobFinishes", "suspend"),
}
CLUSTER_FIELDS = {
    *("upgradeStrategy", "authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations"),
    *("enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs"),
}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
POD_FIELDS = {"containers", "volumes", "terminationGracePeriodSeconds"}
CONTAINER_FIELDS = {"name", "image", "env", "resources", "volumeMounts", "lifecycle"}

KUBECTL = """#!/usr/bin/env bash
echo "$@" >> ROOM/asked
case "$*" in
    *create*) cat > ROOM/manifest.yaml ;;
    *"get rayjob"*) [ -e ROOM/status ] || { echo 'Error (NotFound): rayjobs "x" not found' >&2; exit 1; }
        echo "{\\"status\\": $(cat ROOM/status)}" ;;
    *"get pods"*) echo pod/x-head-1 ;;
    *"job stop"*) echo '{"jobStatus": "STOPPED", "jobDeploymentStatus": "Complete"}' > ROOM/status ;;
    *logs*) echo "step 3/60  held-out 41.0%  training 30.0%" ;;
esac
"""
MADE = [
    *("launch.kuberay.image=me/grove:1", "launch.kuberay.volume_claim=runs", "launch.kuberay.secret_name=keys"),
    *("launch.environment=[WANDB_API_KEY,HF_TOKEN]", "launch.kuberay.workers=2", "launch.kuberay.worker_gpus=8"),
]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").write_text(KUBECTL.replace("ROOM", str(tmp_path)))
    (tmp_path / "bin/kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("WANDB_API_KEY", "very secret")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(room: Path, *overrides: str) -> Plan:
    words = ["launch=kuberay", "experiment=hop_search", *MADE, *overrides]
    return plan_launch(compose(words), words, "", "kuberay", room, datetime(2026, 11, 28))


def groups(room: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The RayJob's spec, its head and its groups of workers."""
    made = yaml.safe_load(manifest(plan(room, *overrides)))
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayJob")
    cluster = made["spec"]["rayClusterSpec"]
    return made["spec"], cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])


def test_the_manifest_has_fields_that_kuberay_knows_and_no_others(room: Path):
    spec, head, workers = groups(room)
    assert spec.keys() <= JOB_FIELDS and spec["rayClusterSpec"].keys() <= CLUSTER_FIELDS
    for group in (head, *workers):
        assert group.keys() <= GROUP_FIELDS
        pod = group["template"]["spec"]
        assert pod.keys() <= POD_FIELDS
        [container] = pod["containers"]
        assert container.keys() <= CONTAINER_FIELDS
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_pods_are_as_large_and_as_many_as_the_settings_say(room: Path):
    _, head, [workers] = groups(room, "launch.kuberay.head_cpus=3")
    assert workers["replicas"] == workers["minReplicas"] == 2
    [container] = workers["template"]["spec"]["containers"]
    limits = {"cpu": 8, "memory": "32Gi", "nvidia.com/gpu": 8}
    assert container["resources"] == {"requests": limits, "limits": limits}
    [container] = head["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": 3, "memory": "16Gi"}
    assert groups(room, "launch.kuberay.workers=0")[2] == []


def test_keys_come_from_the_secret_by_name_and_strangers_need_a_token(room: Path):
    spec, head, [workers] = groups(room)
    for group in (head, workers):
        env = group["template"]["spec"]["containers"][0]["env"]
        assert [(each["name"], each["valueFrom"]["secretKeyRef"]) for each in env] == [
            ("WANDB_API_KEY", {"name": "keys", "key": "WANDB_API_KEY"}),
            ("HF_TOKEN", {"name": "keys", "key": "HF_TOKEN"}),
        ]
    assert "very secret" not in manifest(plan(room))
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_run_writes_to_the_volume_and_a_new_cluster_goes_on_with_it(room: Path):
    spec, head, _ = groups(room)
    assert "run.dir=/grove/runs/hop_search-seed0 " in spec["entrypoint"]
    assert spec["backoffLimit"] == 3
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
    [container] = head["template"]["spec"]["containers"]
    assert spec["jobId"] in container["lifecycle"]["preStop"]["exec"]["command"][2]  # a pod that must go saves first


def test_a_run_is_created_watched_and_saves_before_it_stops(room: Path):
    launch = control.start(plan(room))
    assert yaml.safe_load((room / "manifest.yaml").read_text())["metadata"]["name"] == launch.job
    (room / "status").write_text('{"jobStatus": "RUNNING", "rayClusterName": "x-1"}')
    status = control.status_of(room / "runs/hop_search-seed0", launch)
    assert (status.state, status.step, status.success_share) == (State.running, 3, 0.41)
    assert control.stop(room / "runs/hop_search-seed0", launch) is State.stopped
    asked = (room / "asked").read_text()
    assert "--selector=ray.io/cluster=x-1,ray.io/node-type=head" in asked
    assert f"exec pod/x-head-1 -- ray job stop --address=http://127.0.0.1:8265 {launch.job}" in asked
    assert "delete" not in asked
    assert "".join(KubeRay().log(launch, follow=True)).startswith("step 3/60")


def test_one_that_still_waits_for_its_pods_is_taken_away(room: Path):
    launch = control.start(plan(room))
    (room / "status").write_text('{"jobDeploymentStatus": "Initializing"}')
    KubeRay().stop(launch)
    assert f"delete rayjob {launch.job}" in (room / "asked").read_text()
    (room / "status").unlink()
    assert control.state_of(room / "runs/hop_search-seed0", launch) is State.lost


def test_a_refusal_is_told_in_kubectls_own_words(room: Path):
    (room / "bin/kubectl").write_text("#!/bin/sh\necho 'no matches for kind RayJob' >&2\nexit 1\n")
    with pytest.raises(LaunchError, match="no matches for kind RayJob"):
        control.start(plan(room))
    assert not (room / "runs/hop_search-seed0/launch.json").exists()


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, State.waiting),
        ({"jobStatus": "PENDING"}, State.waiting),
        ({"jobStatus": "FAILED", "jobDeploymentStatus": "Retrying"}, State.waiting),
        ({"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}, State.failed),
        ({"jobDeploymentStatus": "Failed"}, State.failed),
        ({"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete"}, State.finished),
        ({"jobStatus": "STOPPED", "jobDeploymentStatus": "Failed"}, State.stopped),
    ],
)
def test_what_a_status_means(status: dict[str, str], state: State):
    assert state_in(json.loads(json.dumps(status))) is state


def test_a_template_of_ones_own_is_filled_and_an_unknown_value_named(room: Path):
    (room / "mine.yaml").write_text("name: {{ job }}\n")
    assert manifest(plan(room, "launch.kuberay.template=mine.yaml")).startswith("name: hop-search-seed0-")
    (room / "mine.yaml").write_text("name: {{ jbo }}\n")
    with pytest.raises(ConfigError, match=r"'jbo' is undefined.*There are: job, command"):
        manifest(plan(room, "launch.kuberay.template=mine.yaml"))
