import logging
import os
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from conf.schema import TrackerConfig, TrackerMode
from rl import tracker
from rl.tracker import Tracker


class FakeRun:
    """A wandb run that keeps what it is given and fails when told to."""

    def __init__(self, folder: str):
        self.dir = f"{folder}/wandb/offline-run-1/files"
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0
        self.log_error: Exception | None = None
        self.finish_s = 0.0
        self.metrics: dict[str, dict] = {}
        self.summary: dict[str, object] = {}

    def define_metric(self, name: str, **options: str) -> None:
        self.metrics[name] = options

    def log(self, numbers: dict, step: int) -> None:
        if self.log_error:
            raise self.log_error
        self.logged.append((step, numbers))

    def finish(self) -> None:
        time.sleep(self.finish_s)
        self.finished += 1


class FakeWandb(types.ModuleType):
    """As much of wandb as the tracker uses."""

    def __init__(self):
        super().__init__("wandb")
        self.inits: list[dict] = []
        self.runs: list[FakeRun] = []
        self.failing_modes: set[str] = set()
        self.has_key = True
        self.teardowns = 0

    def Settings(self, **settings: object) -> dict:
        return settings

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt and not verify, "a run never waits for a person"
        return self.has_key

    def init(self, **options: object) -> FakeRun:
        self.inits.append(options)
        if options["mode"] in self.failing_modes:
            raise ConnectionError("no such host\nand a hint nobody needs")
        self.runs.append(FakeRun(str(options["dir"])))
        return self.runs[-1]

    def teardown(self) -> None:
        self.teardowns += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_SILENT", "true")
    return fake


def start(tmp_path: Path, mode: TrackerMode = TrackerMode.offline) -> Tracker:
    return Tracker(TrackerConfig(mode=mode, project="p"), tmp_path, "hop", {"seed": 1})


def test_metrics_go_offline_into_the_run_folder_by_default(tmp_path, wandb):
    started = start(tmp_path)
    started.log({"step": 3, "loss/total": 0.5, "loss/kl": None}, step=3)
    started.finish()
    started.finish()
    options = wandb.inits[0]
    assert (options["mode"], options["dir"], options["project"], options["name"]) == (
        "offline",
        str(tmp_path),
        "p",
        "hop",
    )
    assert options["config"] == {"seed": 1}
    assert options["entity"] is None
    assert wandb.runs[0].logged == [(3, {"loss/total": 0.5})]
    assert wandb.runs[0].finished == 1
    assert not started.is_on


def test_curves_and_summaries_are_set_up_for_whoever_opens_the_run(tmp_path, wandb):
    started = start(tmp_path)
    metrics = wandb.runs[0].metrics
    tokens = "rollout/total_generated_tokens"
    assert metrics["eval/*"] == {"step_metric": tokens}
    assert metrics["eval/success_share"] == {"step_metric": tokens, "summary": "last,max"}
    assert metrics["time/step_seconds"] == {"summary": "last,min"}
    started.summarize({"success_after": 0.75, "steps": 60})
    assert wandb.runs[0].summary == {"success_after": 0.75, "steps": 60}


def test_a_disabled_tracker_never_touches_wandb(tmp_path, wandb):
    started = start(tmp_path, TrackerMode.disabled)
    started.log({"loss/total": 0.5}, step=1)
    started.finish()
    assert wandb.inits == []


def test_without_network_an_online_run_is_tracked_offline_and_says_so_once(tmp_path, wandb, caplog):
    wandb.failing_modes = {"online"}
    started = start(tmp_path, TrackerMode.online)
    assert started.is_on
    assert [options["mode"] for options in wandb.inits] == ["online", "offline"]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb could not start online (ConnectionError: no such host); the run goes on, metrics.jsonl has all"
    ]


def test_without_a_key_nobody_is_asked_for_one(tmp_path, wandb, caplog):
    wandb.has_key = False
    start(tmp_path, TrackerMode.online)
    assert [options["mode"] for options in wandb.inits] == ["offline"]
    assert "no API key was found" in caplog.text


def test_a_tracker_that_cannot_start_is_off(tmp_path, wandb, caplog):
    wandb.failing_modes = {"offline"}
    started = start(tmp_path)
    started.log({"loss/total": 0.5}, step=1)
    started.finish()
    assert not started.is_on
    assert len(caplog.records) == 1


def test_a_failure_while_logging_is_told_once_and_turns_tracking_off(tmp_path, wandb, caplog):
    started = start(tmp_path)
    wandb.runs[0].log_error = BrokenPipeError("gone")
    for step in (1, 2, 3):
        started.log({"loss/total": 0.5}, step=step)
    assert len(caplog.records) == 1
    assert "wandb could not log (BrokenPipeError: gone)" in caplog.text
    assert wandb.teardowns == 1  # or its exit hook would print a traceback


def test_an_upload_that_never_ends_does_not_keep_the_run(tmp_path, wandb, monkeypatch, caplog):
    monkeypatch.setattr(tracker, "FINISH_TIMEOUT_S", 0.05)
    started = start(tmp_path)
    wandb.runs[0].finish_s = 0.5
    began = time.monotonic()
    started.finish()
    assert time.monotonic() - began < 0.4
    assert f"send the rest with: wandb sync {tmp_path}/wandb/offline-run-1" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_the_real_wandb_is_quiet_survives_its_process_and_keeps_no_key(tmp_path, killed):
    key = "abcdef0123456789" * 2 + "abcdef01"
    script = textwrap.dedent(f"""
        import logging, os, signal, time
        from pathlib import Path
        from conf.schema import TrackerConfig
        from rl.tracker import Tracker
        logging.basicConfig(format="%(message)s")
        tracker = Tracker(TrackerConfig(), Path({str(tmp_path)!r}), "real", {{"seed": 1}})
        assert tracker.is_on
        tracker.log({{"loss/total": 0.5}}, step=1)
        if {killed}:
            for child in Path("/proc/self/task").glob("*/children"):
                for pid in child.read_text().split():
                    if "wandb-core" in Path("/proc", pid, "cmdline").read_text():
                        os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.5)
            tracker.log({{"loss/total": 0.5}}, step=2)
            tracker.log({{"loss/total": 0.5}}, step=3)
            assert not tracker.is_on
        tracker.finish()
    """)
    environment = os.environ | {"WANDB_API_KEY": key, "WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["HOME"] = str(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == killed, done.stderr  # one line of ours when it died, nothing otherwise
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if key.encode() in path.read_bytes()]


def test_a_failed_start_is_logged_as_a_warning(tmp_path, wandb, caplog):
    wandb.failing_modes = {"offline"}
    start(tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
