"""What a job runs: the command, continued where there is a run, and its ending written down."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rl import cli
from rl.jobs import passed, start
from rl.jobs.record import State, read_ending


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that jobs of this test gave; each ends well."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv(passed.NAME_VARIABLE, raising=False)
    commands: list[list[str]] = []
    answer_with(monkeypatch, lambda: 0, commands)
    return commands


def answer_with(monkeypatch: pytest.MonkeyPatch, does: Callable[[], int], commands: list[list[str]]) -> None:
    def grove(words: list[str]) -> int:
        commands.append(words)
        return does()

    monkeypatch.setattr(cli, "main", grove)


def ended(folder: Path) -> State | None:
    ending = read_ending(folder)
    return ending and ending.state


def test_a_new_run_is_started_and_one_that_is_there_continued(tmp_path: Path, asked: list[list[str]]):
    words = ["--run-dir", str(tmp_path), "--", "train", "seed=1"]
    assert start.main(words) == 0
    (tmp_path / "metrics.jsonl").touch()
    assert start.main(words) == 0
    assert asked == [["train", "seed=1"], ["train", "seed=1", "run.resume=true"]]
    assert ended(tmp_path) is State.finished


def test_a_signal_ends_it_as_stopped(tmp_path: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    def preempted() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    answer_with(monkeypatch, preempted, asked)
    assert start.main(["--run-dir", str(tmp_path), "--", "train"]) == 130
    assert ended(tmp_path) is State.stopped


def test_a_fault_of_ours_is_written_down_too(tmp_path: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    def crash() -> int:
        raise ZeroDivisionError

    answer_with(monkeypatch, crash, asked)
    with pytest.raises(ZeroDivisionError):
        start.main(["--run-dir", str(tmp_path), "--", "train"])
    assert ended(tmp_path) is State.failed


def test_keys_that_the_head_no_longer_has_are_told(
    tmp_path: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Empty:
        def internal_kv_get(self, key: bytes, namespace: None) -> None: ...

        def internal_kv_del(self, key: bytes, by_prefix: bool, namespace: None) -> None: ...

    monkeypatch.setattr(passed, "_head", Empty)
    monkeypatch.setenv(passed.NAME_VARIABLE, passed.new_name())
    assert start.main(["--run-dir", str(tmp_path), "--", "train"]) == 1
    assert "Launch the run again" in capsys.readouterr().err
    assert (asked, ended(tmp_path)) == ([], State.failed)
