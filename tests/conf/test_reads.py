"""Which settings are read: noted once, in every process, whoever copies or checks them notwithstanding."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from conf import reads
from conf.checks import problems
from conf.compose import compose, to_yaml
from conf.keys import all_keys
from conf.reads import changed, excused, pattern_of, plain, read_keys, record_field, unread, watched
from conf.schema import Config, RewardModelConfig, RolloutConfig, SourceConfig
from rl.jobs.template import filled
from rl.placement import Node, plan
from rl.run_folder import settings
from rollout.expand import build_expander

IMPATIENT = RolloutConfig(batch_timeout_s=1.0)
MINE = "rewards.sources.mine={fn: my.py:reward, args: {size: 2}}"


@pytest.fixture
def cfg() -> Config:
    return plain(compose(["experiment=hop_search", MINE]))


def places(cfg: Config) -> object:
    """A part of every run, which reads learner.num_processes and no learning rate."""
    return plan(cfg, [Node("here", "127.0.0.1", 64)])


def test_a_setting_that_a_part_of_the_run_reads_is_noted_by_its_key(cfg: Config, tmp_path: Path):
    places(watched(cfg, tmp_path))
    assert "learner.num_processes" in read_keys(tmp_path)
    assert "learner.learning_rate" not in read_keys(tmp_path)


def test_what_a_test_or_a_users_code_reads_is_no_use(cfg: Config, tmp_path: Path):
    assert watched(cfg, tmp_path).learner.learning_rate == cfg.learner.learning_rate
    assert read_keys(tmp_path) == set()


WHOLE: dict[str, Callable[[Config], object]] = {
    "compared": lambda cfg: cfg == plain(cfg),
    "printed": repr,
    "made a dict": asdict,
    "copied": copy.deepcopy,
    "replaced": lambda cfg: replace(cfg, seed=1),
    "pickled": lambda cfg: pickle.loads(pickle.dumps(cfg)),
    "written": to_yaml,
    "sent to the tracker": settings,
    "checked": problems,
}


@pytest.mark.parametrize("handle", WHOLE.values(), ids=WHOLE)
def test_handling_a_whole_configuration_uses_none_of_it(
    handle: Callable[[Config], object], cfg: Config, tmp_path: Path
):
    handle(watched(cfg, tmp_path))
    assert read_keys(tmp_path) == set()


def test_a_watched_configuration_equals_the_plain_one_and_stays_watched_through_copies(cfg: Config, tmp_path: Path):
    its = watched(cfg, tmp_path)
    assert its == cfg and cfg == its and isinstance(its, Config)
    assert replace(its, seed=7) != cfg
    arrived = pickle.loads(pickle.dumps(replace(its, rollout=replace(its.rollout, num_leaves=3))))
    assert arrived.rollout.num_leaves == 3
    build_expander(arrived.rollout, 0)
    assert "rollout.num_leaves" in read_keys(tmp_path) and "rollout.num_trees" not in read_keys(tmp_path)


def test_after_its_first_use_a_setting_costs_what_it_always_did(cfg: Config, tmp_path: Path):
    its = watched(cfg, tmp_path)
    assert "num_processes" in vars(type(its.learner))  # the note that is still to be taken
    places(its)
    assert "num_processes" not in vars(type(its.learner))  # the record's own slot answers from now on
    lines = (tmp_path / reads.NOTES).read_text().splitlines()
    places(its)
    assert (tmp_path / reads.NOTES).read_text().splitlines() == lines


def test_another_process_notes_into_the_same_folder(cfg: Config, tmp_path: Path):
    sent = tmp_path / "cfg.pickle"
    sent.write_bytes(pickle.dumps(watched(cfg, tmp_path)))
    code = f"""
import pickle
from pathlib import Path
from rollout.expand import build_expander
build_expander(pickle.loads(Path({str(sent)!r}).read_bytes()).rollout, 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)
    assert "rollout.max_forks" in read_keys(tmp_path)


def test_what_a_template_asks_for_is_a_use(cfg: Config, tmp_path: Path):
    template = tmp_path / "mine.jinja"
    template.write_text("#SBATCH --nodes={{ slurm.nodes }}")
    assert filled(str(template), "", {"slurm": watched(cfg, tmp_path).launch.slurm}) == "#SBATCH --nodes=1"
    assert read_keys(tmp_path) == {"launch.slurm.nodes"}


def test_records_that_a_test_makes_itself_can_be_noted_by_their_type(tmp_path: Path):
    code = f"""
from pathlib import Path
from conf import reads
from conf.schema import RolloutConfig
from rollout.expand import build_expander
reads.note_records(Path({str(tmp_path)!r}))
made = RolloutConfig(num_leaves=3)
assert made == RolloutConfig(num_leaves=3) and made.num_leaves == 3
build_expander(made, 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)
    assert {"RolloutConfig:num_leaves", "RolloutConfig:max_forks"} <= read_keys(tmp_path)
    assert "RolloutConfig:num_trees" not in read_keys(tmp_path)
    assert record_field("rewards.sources.<name>.parts.<name>.weight") == "PartConfig:weight"


def test_a_folder_that_is_gone_disturbs_nobody(cfg: Config, tmp_path: Path):
    assert places(watched(cfg, tmp_path / "gone"))


def test_the_environment_can_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(reads.FOLDER_VARIABLE, str(tmp_path))
    places(compose(["experiment=hop_search"]))
    assert "learner.num_processes" in read_keys(tmp_path)


def test_changed_names_what_differs_from_the_records_and_from_an_empty_entry(cfg: Config):
    found = changed(cfg)
    assert found["run.max_generated_tokens"] == 250_000 and found["rewards.sources.mine.args"] == {"size": 2}
    assert "rewards.sources.mine.weight" not in found  # 1, as every source has it
    assert "run.dir" not in found  # runs/${run.name}-seed${seed}, as it always is


def test_unread_is_what_was_changed_and_not_read_and_not_excused(cfg: Config):
    cfg = replace(cfg, rollout=replace(cfg.rollout, num_trees=4, keep_leaves=1))
    everything = changed(cfg).keys() - {"rollout.num_trees", "rollout.keep_leaves"}
    assert unread(cfg, everything) == {"rollout.num_trees": 4, "rollout.keep_leaves": 1}
    assert unread(cfg, everything, ["rollout.num_trees"]) == {"rollout.keep_leaves": 1}
    assert unread(cfg, everything, ["rollout."]) == {}


def test_a_name_and_the_signal_of_a_source_that_is_only_recorded_may_say_nothing(cfg: Config):
    cfg.rewards.sources["mine"] = SourceConfig(fn="my.py:reward", signal="step", weight=0.0)
    assert {"run.name", "rewards.sources.mine.signal"} <= set(excused(cfg))
    assert "rewards.sources.progress.signal" not in excused(cfg)


def test_every_excused_key_exists(cfg: Config):
    cfg.rewards.models["judge"] = RewardModelConfig()
    known = {key.name for key in all_keys()}
    found = [pattern_of(key) if key[-1] != "." else key for key in excused(replace(cfg, rollout=IMPATIENT))]
    assert "rollout.min_batch_share" in found and "rewards.models.<name>.max_retries" in found
    assert [key for key in found if key not in known and not any(each.startswith(key) for each in known)] == []


def test_a_pattern_has_name_in_the_place_of_every_name_of_the_user(cfg: Config):
    assert pattern_of("credit.terms.fork.signals.step.scale") == "credit.terms.<name>.signals.<name>.scale"
    assert {pattern_of(key) for key in changed(cfg)} <= {key.name for key in all_keys()}
