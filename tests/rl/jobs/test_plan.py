"""What a launch decides before it does anything."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import pytest

from conf.compose import compose
from conf.errors import ConfigError
from conf.settle import settled
from rl.jobs.plan import JOB_NAME_CHARS, Plan, changed_settings, job_name, plan_launch, quoted
from rl.run_folder import settings

NOW = datetime(2026, 11, 28, 9, 30, 5)
HERE = Path("/home/me/project")


def plan(where: str, *overrides: str, config_dir: str = "", folder: Path = HERE) -> Plan:
    words = [f"launch={where}", "experiment=hop_search", *overrides]
    return plan_launch(compose(words, config_dir), words, config_dir, where, folder, NOW)


def test_a_run_of_this_machine_is_trained_in_its_own_folder_without_the_words_of_its_launch():
    made = plan("local", "seed=3", "launch.stop_limit_s=9")
    assert made.words == ("train", "experiment=hop_search", "seed=3", "run.dir=/home/me/project/runs/hop_search-seed3")
    assert made.here == HERE / "runs/hop_search-seed3"
    assert made.command == "grove launch local experiment=hop_search seed=3 launch.stop_limit_s=9"
    assert made.job == "hop-search-seed3-20261128-093005"


def test_a_run_of_a_cluster_joins_the_ray_that_is_up_and_writes_below_the_clusters_own_root():
    made = plan("ray", "launch.run_root=/mnt/shared")
    assert "run.dir=/mnt/shared/runs/hop_search-seed0" in made.words
    assert "model.warm_start.cache_dir=/mnt/shared/runs/warm_start" in made.words  # every node finds the model there
    assert made.words[-1] == "cluster=existing"
    assert made.here == HERE / "runs/hop_search-seed0"


def test_an_absolute_run_dir_is_the_same_everywhere():
    made = plan("ray", "launch.run_root=/mnt/shared", "run.dir=/data/x")
    assert (made.here, made.there) == (Path("/data/x"), "/data/x")


@pytest.mark.parametrize(
    ("words", "joins"),
    [
        (["local"], False),
        (["ray"], True),
        (["ray", "cluster.address=ray://elsewhere:10001"], False),  # the user has said where
        (["slurm"], False),  # one node starts Ray itself
        (["slurm", "launch.slurm.nodes=2"], True),
    ],
)
def test_who_joins_a_cluster(words: list[str], joins: bool):
    assert ("cluster=existing" in plan(*words).words) == joins


def test_the_words_of_a_plan_compose_to_the_same_run(tmp_path: Path):
    made = plan("local", "run.name='a \"b\" c'", folder=tmp_path)
    cfg = compose(list(made.words[1:]))
    assert cfg.run.dir == str(tmp_path / 'runs/a "b" c-seed0') == made.there


def test_a_folder_of_own_groups_goes_along_when_it_lies_inside(tmp_path: Path):
    (tmp_path / "mine/launch").mkdir(parents=True)
    (tmp_path / "mine/launch/big.yaml").write_text("kind: ray\nrun_root: /mnt\n")
    made = plan("big", config_dir=str(tmp_path / "mine"), folder=tmp_path)
    assert made.words[-2:] == ("--config-dir", "mine")
    assert made.command.startswith("grove launch big ")
    with pytest.raises(ConfigError, match="lies outside of"):
        plan("big", config_dir=str(tmp_path / "mine"), folder=tmp_path / "elsewhere")


def test_a_secret_among_the_settings_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_API_KEY", "abcdefghijk")
    with pytest.raises(ConfigError, match=r"tracker\.entity holds a secret"):
        plan("local", "tracker.entity=abcdefghijk")


def test_a_job_has_a_name_that_every_scheduler_takes():
    for run in ("hop_search-seed0", "x" * 80, "7 Days/ünder", "--"):
        name = job_name(run, NOW)
        assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name) and len(name) <= JOB_NAME_CHARS


@pytest.mark.parametrize("value", ["/a/b", "a b", 'say "x"', "{x}", "a,b", "${x}", "a\\b", "a\\"])
def test_a_quoted_text_is_read_back_as_it_was(value: str):
    assert compose([f"run.name={quoted(value)}", "run.dir=x"]).run.name == value


def test_what_makes_a_run_may_not_change_on_the_way():
    first = compose(["experiment=hop_search"])
    stored = settings(settled(first))
    later = compose(["experiment=hop_search", "run.num_steps=9", "cluster=existing", "tracker=disabled", "launch=ray"])
    assert changed_settings(settled(later), stored) == []
    other = compose(["experiment=hop_search", "learner.learning_rate=0.5", "~rewards.sources.tool_success"])
    lines = changed_settings(settled(other), stored)
    assert lines[0] == f"learner.learning_rate=0.5, and it was {first.learner.learning_rate}"
    assert any(line.startswith("rewards.sources.tool_success.") and "(none)" in line for line in lines)


def test_a_setting_that_a_newer_grove_has_more_is_no_change():
    cfg = compose(["experiment=hop_search"])
    stored = settings(cfg)
    del stored["learner"]["learning_rate"]
    assert changed_settings(cfg, stored) == []
