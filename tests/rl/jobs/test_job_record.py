"""What is written into the run folder about its launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import DataError
from rl.jobs.record import (
    Ending,
    Launch,
    State,
    clear_ending,
    launches_below,
    read_ending,
    read_launch,
    write_ending,
    write_launch,
)


def launch(job: str, at: float = 0.0) -> Launch:
    return Launch(kind="local", job=job, run_dir="/runs/x", environment=["WANDB_API_KEY"], launched_at=at)


def test_a_launch_is_read_back_and_only_its_owner_can_read_it(tmp_path: Path):
    write_launch(tmp_path / "x", launch("7"))
    assert read_launch(tmp_path / "x") == launch("7")
    assert (tmp_path / "x/launch.json").stat().st_mode & 0o077 == 0


def test_launches_are_listed_the_newest_last(tmp_path: Path):
    write_launch(tmp_path / "a", launch("2", at=20.0))
    write_launch(tmp_path / "b", launch("1", at=10.0))
    (tmp_path / "never_launched").mkdir()
    assert [each.job for _, each in launches_below(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "local", "colour": 1}'])
def test_a_damaged_record_is_an_error_of_the_users(tmp_path: Path, text: str):
    (tmp_path / "launch.json").write_text(text)
    with pytest.raises(DataError, match="look for the job by hand"):
        read_launch(tmp_path)


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, State.finished), (130, State.stopped), (143, State.stopped), (2, State.failed), (-9, State.failed)],
)
def test_an_exit_code_says_how_it_ended(tmp_path: Path, code: int, state: State):
    write_ending(tmp_path, Ending(exit_code=code, at=1.0, pid=5))
    ending = read_ending(tmp_path)
    assert ending is not None and ending.state is state
    clear_ending(tmp_path)
    assert read_ending(tmp_path) is None
    clear_ending(tmp_path)


def test_the_record_is_plain_json(tmp_path: Path):
    write_launch(tmp_path, launch("7"))
    assert json.loads((tmp_path / "launch.json").read_text())["environment"] == ["WANDB_API_KEY"]
