"""What a run's checkpoint holds, with parts that answer in this process."""

from __future__ import annotations

import logging
import random
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from conf.errors import CheckpointError, ConfigError, DiskFull
from conf.schema import Config, RunConfig
from rewards.drawn import parse_scored, parse_tree
from rl import checkpoint
from rl.ahead import Grown
from rl.in_flight import Kept
from rl.launch import Parts
from rl.policy.written import Written
from rl.run_folder import RunFolder
from rl.saving import Saver

SCORED = parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0})
GROWN = parse_tree("q -> a")


class Process:
    """A learner that writes one file, some looks after it was asked to."""

    def __init__(self, looks: int = 2, error: str = "") -> None:
        self.looks, self.error, self.value, self.loaded = looks, error, 1.0, ""
        self._left, self._copied, self._folder = 0, 0.0, Path()

    def begin_save(self, folder: str) -> list[None]:
        self._copied, self._left, self._folder = self.value, self.looks, Path(folder)
        return [None]

    def saved(self) -> list[Written]:
        self._left -= 1
        if self._left > 0:
            return [Written(done=False)]
        if not self.error:
            (self._folder / "weights").write_text(str(self._copied))
        return [Written(done=True, error=self.error)]

    def load(self, folder: str) -> list[None]:
        self.loaded = (Path(folder) / "weights").read_text()
        return [None]

    def answer(self, calls: list[Any], *, limit_s: float, what: str) -> Any:
        return calls[0]

    def answers(self, calls: list[Any], *, limit_s: float, what: str) -> list[Any]:
        return calls


class Scores:
    """A call is the scored tree, or None while it is being scored."""

    def answers_so_far(self, calls: dict[int, Any]) -> dict[int, Any]:
        return {index: call for index, call in calls.items() if call is not None}


def saver(folder: Path, process: Process, seed: int = 0, **run: Any) -> Saver:
    parts = Parts(pool=cast(Any, None), scoring=cast(Any, Scores()), learner=cast(Any, process), publisher=None)
    return Saver(Config(seed=seed, run=RunConfig(**run)), RunFolder(folder), parts)


def test_what_is_written_is_of_when_it_was_begun_though_training_goes_on(tmp_path: Path):
    process = Process(looks=5)
    saving = saver(tmp_path, process)
    saving.begin(7, {"step": 7}, [], 0.5)
    process.value = 2.0  # the next update
    saving.wait()
    found = saver(tmp_path, process).restore()
    assert found is not None and process.loaded == "1.0"
    assert (found.checkpoint.step, found.run, found.kept) == (7, {"step": 7}, [])
    assert checkpoint.success_of(found.checkpoint) == 0.5


def test_in_the_foreground_the_files_are_there_at_once(tmp_path: Path):
    saver(tmp_path, Process(looks=5), checkpoint_in_background=False).begin(7, {}, [], None)
    assert [each.step for each in checkpoint.checkpoints(tmp_path / "checkpoints")] == [7]


def test_trees_in_flight_are_kept_with_the_scores_they_have(tmp_path: Path):
    process = Process()
    saving = saver(tmp_path, process)
    ahead = [
        Grown(step=7, trees={0: SCORED.tree, 1: SCORED.tree}, calls={0: SCORED, 1: SCORED}),
        Grown(step=8, trees={0: GROWN, 2: SCORED.tree}, calls={0: None, 2: SCORED}),
        Grown(step=9),
    ]
    saving.begin(7, {}, ahead, None)
    saving.wait()
    found = saver(tmp_path, process).restore()
    assert found is not None and found.kept == [
        Kept(step=7, scored={0: SCORED, 1: SCORED}),
        Kept(step=8, trees={0: GROWN}, scored={2: SCORED}),
        Kept(step=9),
    ]


def test_a_disk_that_fills_while_training_goes_on_is_told_at_the_next_look(tmp_path: Path):
    good = saver(tmp_path, Process())
    good.begin(10, {}, [], None)
    good.wait()
    saving = saver(tmp_path, Process(error="SafetensorError: I/O error: No space left on device (os error 28)"))
    saving.begin(20, {}, [], None)
    with pytest.raises(CheckpointError, match=r"step 20 could not be written.*No space left.*bytes are needed.*free"):
        saving.wait()
    saving.check()  # told once
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000010"]


FULL = "SafetensorError: I/O error: No space left on device (os error 28)"


def checkpoint_steps(folder: Path) -> list[int]:
    return [each.step for each in checkpoint.checkpoints(folder / "checkpoints")]


def test_one_checkpoint_that_finds_no_room_is_left_out_and_the_next_one_waits_for_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rl.disk.PAUSE_S", 0.01)
    process = Process(error=FULL)
    saving = saver(tmp_path, process)
    saving.begin(10, {}, [], None)
    saving._background._thread.join()  # pyright: ignore
    saving.check()
    assert "training goes on without a checkpoint" in caplog.text and checkpoint_steps(tmp_path) == []
    threading.Timer(0.2, lambda: setattr(process, "error", "")).start()
    saving.begin(20, {}, [], None)  # returns when there is room
    assert "no space left for a checkpoint" in caplog.text and checkpoint_steps(tmp_path) == [20]
    saving.begin(30, {}, [], None)  # in the background again
    saving.wait()
    assert checkpoint_steps(tmp_path) == [20, 30]


def test_the_last_checkpoint_of_a_run_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rl.disk.PAUSE_S", 0.01)
    process = Process(error=FULL)
    saving = saver(tmp_path, process)
    saving.begin(10, {"step": 10}, [], None)
    threading.Timer(0.2, lambda: setattr(process, "error", "")).start()
    saving.finish()
    assert checkpoint_steps(tmp_path) == [10]


def test_without_a_wait_for_room_a_full_disk_is_an_error(tmp_path: Path):
    saving = saver(tmp_path, Process(error=FULL), disk_wait_s=0.0)
    saving.begin(10, {}, [], None)
    with pytest.raises(DiskFull, match="No space left"):
        saving.finish()
    saving = saver(tmp_path, Process(error=FULL), disk_wait_s=0.0)
    saving.begin(20, {}, [], None)
    saving._background._thread.join()  # pyright: ignore
    with pytest.raises(DiskFull, match="step 20"):
        saving.check()


def test_generators_of_the_runs_process_go_on_where_they_were(tmp_path: Path):
    saving = saver(tmp_path, Process())
    random.seed(5)
    saving.begin(1, {}, [], None)
    saving.wait()
    wanted = random.random()
    random.seed(6)
    saver(tmp_path, Process()).restore()
    assert random.random() == wanted


def test_another_seed_is_refused(tmp_path: Path):
    saving = saver(tmp_path, Process(), seed=3)
    saving.begin(1, {}, [], None)
    saving.wait()
    with pytest.raises(ConfigError, match=r"seed=4 differs from the seed=3 .* Use seed=3"):
        saver(tmp_path, Process(), seed=4).restore()


def test_other_libraries_and_a_lost_cache_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    cache = RunFolder(tmp_path).reward_cache
    cache.touch()
    monkeypatch.setattr("rl.saving.installed_versions", lambda: {"torch": "1.0", "ray": "2.0"})
    saving = saver(tmp_path, Process())
    saving.begin(1, {}, [], None)
    saving.wait()
    cache.unlink()
    monkeypatch.setattr("rl.saving.installed_versions", lambda: {"torch": "1.1", "ray": "2.0"})
    with caplog.at_level(logging.WARNING):
        saver(tmp_path, Process()).restore()
    assert "is of other versions (torch 1.0 -> 1.1)" in caplog.text
    assert "reward_cache.sqlite is gone" in caplog.text


def test_a_run_without_a_checkpoint_starts_anew(tmp_path: Path):
    assert saver(tmp_path, Process()).restore() is None
    shutil.rmtree(tmp_path)
    assert saver(tmp_path, Process()).restore() is None
