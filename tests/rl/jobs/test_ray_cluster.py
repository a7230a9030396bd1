"""A job of a Ray cluster as far as it goes without one; tests/test_launch_page.py has a real one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray

from conf.compose import compose
from conf.errors import LaunchError, WaitTimeout
from rl.jobs import passed, ray_cluster
from rl.jobs.plan import Plan, plan_launch
from rl.jobs.ray_cluster import RayCluster
from rl.jobs.record import Launch, State

pytestmark = pytest.mark.slow

STATES = {"new": "PENDING", "busy": "RUNNING", "done": "SUCCEEDED", "broken": "FAILED", "ended": "STOPPED"}


class JobServer(BaseHTTPRequestHandler):
    """Answers as Ray's does, and remembers what it was asked."""

    seen: list[tuple[str, str, bytes]]
    takes_parcels = True

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.command, self.path, body))
        job = self.path.rpartition("/")[2]
        if self.path == "/api/version":
            self._answer({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})
        elif self.path.startswith("/api/packages/"):
            exists = self.command == "PUT" and (self.takes_parcels or "grove_" not in self.path)
            self._answer("", 200 if exists else 404)
        elif self.command == "POST":
            name = json.loads(body)["submission_id"]
            self._answer({"job_id": name, "submission_id": name})
        elif job in STATES:
            self._answer({"type": "SUBMISSION", "status": STATES[job], "entrypoint": "x", "submission_id": job})
        else:
            self._answer("no such job", 404)

    do_GET = do_PUT = do_POST = _handle

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def served(*, takes_parcels: bool = True) -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Its address, and what it is asked."""
    handler = type("Handler", (JobServer,), {"seen": [], "takes_parcels": takes_parcels})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.seen
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_API_KEY", "very secret")
    monkeypatch.setenv("RAY_ADDRESS", "http://nowhere.invalid:1")  # Ray's client would go there
    (tmp_path / "my_rewards.py").write_text("x = 1\n")
    return tmp_path


def plan(room: Path, address: str) -> Plan:
    words = ["launch=ray", "experiment=hop_search", f"launch.ray.address={address}", "launch.environment=[MY_API_KEY]"]
    return plan_launch(compose(words), words, "", "ray", room, datetime(2026, 11, 28))


def test_a_job_gets_the_folder_and_the_name_of_its_keys_but_no_key(room: Path):
    with served() as (address, seen):
        launch = RayCluster().start(plan(room, address))
    assert (launch.kind, launch.address, launch.job) == ("ray", address, "hop-search-seed0-20261128-000000")
    [(_, path, parcel)] = [ask for ask in seen if b"very secret" in ask[2]]
    assert path.startswith("/api/packages/gcs/grove_") and json.loads(parcel) == {"MY_API_KEY": "very secret"}
    [submitted] = [json.loads(body) for method, _, body in seen if method == "POST"]
    assert submitted["runtime_env"]["env_vars"][passed.NAME_VARIABLE] == path.rpartition("/")[2]
    assert submitted["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
    assert submitted["entrypoint"].startswith("exec python -P -m rl.jobs.start --run-dir ")
    assert os.environ["RAY_ADDRESS"] == "http://nowhere.invalid:1"


def test_a_head_that_takes_no_parcel_gets_no_job(room: Path):
    with served(takes_parcels=False) as (address, seen):
        with pytest.raises(LaunchError, match=r"would not take the variables .* write them to its logs"):
            RayCluster().start(plan(room, address))
        assert [path for method, path, _ in seen if method == "POST"] == []


def test_the_server_says_how_a_job_is_and_what_it_has_forgotten_is_gone(room: Path):
    with served() as (address, _):

        def state(job: str) -> State | None:
            return RayCluster().state(Launch(kind="ray", job=job, run_dir="x", address=address))

        found = [state(job) for job in STATES]
        assert found == [State.waiting, State.running, State.finished, State.failed, State.stopped]
        assert state("of an earlier cluster") is None


def test_where_nobody_answers_it_says_what_to_look_at(room: Path):
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LaunchError, match=f"no job server of Ray answers at launch.ray.address={address}"):
            RayCluster().state(Launch(kind="ray", job="x", run_dir="x", address=address))


def test_a_dry_run_names_the_files_and_the_variables(room: Path):
    shown = RayCluster().shown(plan(room, "http://head:8265")).splitlines()
    assert shown[:3] == ["submits to http://head:8265", f"uploads 1 file, 0.0 MiB, of {room}", "passes MY_API_KEY"]


class Head:
    """The memory of a cluster's head."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}

    def internal_kv_get(self, key: bytes, namespace: None) -> bytes | None:
        return self.kept.get(key)

    def internal_kv_del(self, key: bytes, by_prefix: bool, namespace: None) -> int:
        return 1 if self.kept.pop(key, None) else 0


def test_what_was_passed_is_taken_once_by_each_process_and_forgotten_at_the_end(monkeypatch: pytest.MonkeyPatch):
    head, name = Head(), passed.new_name()
    monkeypatch.setattr(passed, "_head", lambda: head)
    monkeypatch.delenv("MY_API_KEY", raising=False)
    passed.take_passed()  # nothing was passed
    monkeypatch.setenv(passed.NAME_VARIABLE, name)
    head.kept[f"gcs://{name}".encode()] = passed.to_bytes({"MY_API_KEY": "very secret"})
    monkeypatch.setenv("MY_API_KEY", "")  # so that it is put back afterwards
    passed.take_passed()
    assert os.environ["MY_API_KEY"] == "very secret"
    passed.forget_passed()
    assert head.kept == {}
    with pytest.raises(LaunchError, match="no longer in the memory of the cluster's head"):
        passed.take_passed()


class JustUp:
    """A job server whose agents come up while it is asked."""

    def __init__(self, *refusals: str) -> None:
        self.refusals = list(refusals)

    def submit_job(self, submission_id: str) -> str:
        if self.refusals:
            raise RuntimeError(self.refusals.pop(0))
        return submission_id


def test_a_cluster_that_has_just_come_up_is_waited_for_and_one_that_refuses_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_cluster, "AGENT_PAUSE_S", 0.0)
    early = "Request failed with status code 500: No available agent to submit job, please try again later.."
    assert ray_cluster._submitted(JustUp(early, early), submission_id="job") == "job"
    with pytest.raises(RuntimeError, match="no such folder"):
        ray_cluster._submitted(JustUp("no such folder"), submission_id="job")
    monkeypatch.setattr(ray_cluster, "AGENT_LIMIT_S", 0.02)
    with pytest.raises(WaitTimeout, match="an agent of the cluster that takes the job did not come"):
        ray_cluster._submitted(JustUp(*[early] * 1_000_000), submission_id="job")
