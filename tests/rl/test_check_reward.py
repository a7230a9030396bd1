"""`grove check-reward`: each kind of bad reward is told apart, on the sample that ships."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from conf.compose import compose
from conf.errors import ConfigError, DataError
from rewards.drawn import parse_scored
from rl.check_reward import SAMPLE, RewardCheck, Verdict, check_reward, recorded_trees_of
from rl.cli import main
from rl.record import RecordedTree, write_records

pytestmark = pytest.mark.slow  # every check starts three processes

REWARDS = """
import os, time

def fine(step):
    return float(step.facts.tool_ok is True)

def constant(step):
    return 1.0

def large(step):
    return 100.0 * len(step.action_ids)

def silent(step):
    return None

def raises(step):
    return {}["verdict"]

def differs(step):
    return hash(step.action_text) % 1000 / 1000

def late(step):
    time.sleep(60)

def leaves(step):
    os._exit(3)

def fragile(step):
    return 1 / len(step.action_text) if len(step.action_text) < 1000 else None

def longer(trajectory):
    return sum(len(step.action_ids) for step in trajectory) / 100

def of_column(step, level, size=1.0):
    return level * size

class Counted:
    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mine") / "my_rewards.py"
    path.write_text(REWARDS)
    return path


def checked(file: Path, name: str, **arguments) -> RewardCheck:
    return check_reward(f"{file}:{name}", recorded_trees_of("")[:2], **arguments)


def verdicts(check: RewardCheck) -> dict[str, Verdict]:
    return {finding.what: finding.verdict for finding in check.findings}


def detail(check: RewardCheck, what: str) -> str:
    return next(finding.detail for finding in check.findings if finding.what == what)


def test_the_sample_holds_trees_that_fork_and_end_differently():
    found = recorded_trees_of("")
    assert SAMPLE.is_file()
    assert len(found) >= 4
    assert all(len(each.tree.trained_leaves()) > 1 for each in found)
    outcomes = {score.value for each in found for score in each.scored.leaf_signals["outcome"].values()}
    assert outcomes == {0.0, 1.0}


def test_a_good_reward_passes_and_its_setting_can_be_pasted(file: Path):
    check = checked(file, "fine")
    assert check.passed and set(verdicts(check).values()) <= {Verdict.ok, Verdict.warning}
    assert detail(check, "arguments") == "scores steps"
    (setting,) = shlex.split(check.setting)
    source = compose(["experiment=hop_search", setting]).rewards.sources["fine"]
    assert (source.fn, source.weight) == (f"{file}:fine", 0.2)


@pytest.mark.parametrize(
    ("name", "what", "verdict", "message"),
    [
        ("constant", "values", Verdict.warning, "always 1: nothing is told apart"),
        ("large", "values", Verdict.warning, "choose its weight with care"),
        ("large", "length", Verdict.warning, "the policy may learn to be long"),
        ("silent", "scores", Verdict.failure, "nothing to say of any"),
        ("raises", "scores", Verdict.failure, "KeyError: 'verdict' (my_rewards.py:"),
        ("leaves", "scores", Verdict.failure, "died with exit code 3"),
        ("differs", "determinism", Verdict.warning, "differ when another process is asked"),
        ("fragile", "empty steps", Verdict.warning, "ZeroDivisionError"),
        ("longer", "length", Verdict.warning, "correlation +1.00"),
    ],
)
def test_what_a_run_would_stumble_over_is_told(file: Path, name: str, what: str, verdict: Verdict, message: str):
    check = checked(file, name)
    assert verdicts(check)[what] is verdict
    assert message in detail(check, what)
    assert check.passed == (verdict is not Verdict.failure)


def test_a_reward_that_is_late_is_killed_at_its_deadline(file: Path):
    check = check_reward(f"{file}:late", recorded_trees_of("")[:1], timeout_s=0.2)
    assert not check.passed
    assert "timed out; first error: no answer within timeout_s=0.2" in detail(check, "scores")


def test_arguments_and_columns_are_filled(file: Path):
    check = checked(file, "of_column", columns={"level": 2}, args={"size": 0.5})
    assert check.passed and "always 1" in detail(check, "values")
    (setting,) = shlex.split(check.setting)
    assert compose(["experiment=hop_search", setting]).rewards.sources["of_column"].args == {"size": 0.5}
    assert checked(file, "Counted", args={"start": 3}).passed


def test_what_nothing_can_fill_is_refused_with_the_way_to_try_it(file: Path):
    with pytest.raises(ConfigError, match=r'nothing can fill the argument "level".*--column NAME=VALUE'):
        checked(file, "of_column")


def test_trees_come_from_a_run_or_a_file(tmp_path: Path):
    tree = RecordedTree(scored=parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0}))
    write_records(tmp_path / "run" / "trees" / "step_000001.jsonl.gz", [tree])
    assert recorded_trees_of(str(tmp_path / "run")) == [tree]
    assert recorded_trees_of(str(tmp_path / "run" / "trees" / "step_000001.jsonl.gz")) == [tree]
    with pytest.raises(ConfigError, match="neither the folder of a run nor a recorded file"):
        recorded_trees_of(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no recorded trees"):
        recorded_trees_of(str(tmp_path / "empty"))


def test_the_command_shows_a_table_and_ends_with_what_to_type(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(file.parent)
    assert main(["check-reward", "my_rewards.py:fine"]) == 0
    shown = capsys.readouterr().out
    assert "fit for a run" in shown
    assert shown.splitlines()[-1].startswith(
        "grove train experiment=hop_search 'rewards.sources.fine={fn: my_rewards.py"
    )
    assert main(["check-reward", "my_rewards.py:raises"]) == 1
    assert "not fit for a run" in capsys.readouterr().out
    assert main(["check-reward", "my_rewards.py:of_column", "--column", "level"]) == 2
