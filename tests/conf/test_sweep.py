"""What varies in a sweep, how its members are called, and which part of a recipe a setting is about."""

import pytest

from conf.compose import compose
from conf.errors import ConfigError
from conf.keys import group_choices
from conf.sweep import Interval, lacking_entry, read_sweep


def names(*words: str) -> list[str]:
    return [member.name for member in read_sweep(list(words)).members()]


def complaint(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        read_sweep(list(words))
    return str(error.value)


def test_members_are_every_combination_named_by_what_differs():
    sweep = read_sweep(["experiment=hop_search", "credit=portool,grpo", "learner.learning_rate=1e-4,1e-3", "seed=1,2"])
    members = sweep.members()
    assert [member.name for member in members] == [
        *("portool-learning_rate0.0001-seed1", "portool-learning_rate0.0001-seed2"),
        *("portool-learning_rate0.001-seed1", "portool-learning_rate0.001-seed2"),
        *("grpo-learning_rate0.0001-seed1", "grpo-learning_rate0.0001-seed2"),
        *("grpo-learning_rate0.001-seed1", "grpo-learning_rate0.001-seed2"),
    ]
    assert members[0].overrides == ("experiment=hop_search", "credit=portool", "learner.learning_rate=0.0001", "seed=1")
    assert sweep.folder == "runs/sweeps/hop_search-credit-learning_rate-seed"


def test_hydras_grammar_names_the_values():
    assert names("seed=choice(3,5)") == ["seed3", "seed5"]
    assert names("seed=range(1,4)") == ["seed1", "seed2", "seed3"]
    assert names("learner.learning_rate=range(0.1,0.4,0.1)") == [  # 0.4 stays out, and 0.1 + 0.2 is 0.3
        *("learning_rate0.1", "learning_rate0.2", "learning_rate0.3"),
    ]
    assert names("credit=glob(tree_r*)") == ["tree_rl", "tree_rpo"]


def test_a_key_is_shown_by_its_last_word_unless_two_share_it():
    assert names("learner.epochs=1,2")[0] == "epochs1"
    assert names("learner.epochs=1,2", "prm.epochs=1,2")[0] == "learner.epochs1-prm.epochs1"


def test_values_that_no_folder_can_be_called_by_still_give_a_name_each():
    assert names("rollout.expander=chains,comb") == ["expander_chains", "expander_comb"]
    assert names("rollout.temperature=-1,1") == ["temperature-1", "temperature1"]
    one, other = names('\'rewards.sources.mine.fn="a b.py:x","a/b.py:x"\''.strip("'"))
    assert one != other and one.startswith("fn_a_b.py_x-") and other.startswith("fn_a_b.py_x-")
    [long, _] = names(f"model.path={'x' * 300},short")
    assert len(long) < 120


def test_a_value_named_twice_is_one_member():
    assert names("seed=1,1,2") == ["seed1", "seed2"]


def test_a_preset_varies_and_the_command_line_wins_over_it():
    assert names("sweep=seeds") == ["seed0", "seed1", "seed2", "seed3", "seed4"]
    assert names("sweep=seeds", "seed=7,8") == ["seed7", "seed8"]
    assert "nothing varies" in complaint("sweep=seeds", "seed=7")


@pytest.mark.parametrize("preset", sorted(set(group_choices()["sweep"]) - {"grid", "optuna"}))
def test_every_preset_varies_something_that_composes(preset: str):
    sweep = read_sweep([f"sweep={preset}"])
    for member in sweep.named([{each.key: each.values[0] for each in sweep.varied if each.values}]):
        compose(list(member.overrides))


def test_settings_of_the_sweep_stay_out_of_its_members():
    sweep = read_sweep(["sweep.parallel=3", "sweep.dir=here", "run.num_steps=2", "seed=1,2"])
    assert (sweep.settings.parallel, sweep.folder) == (3, "here")
    assert sweep.fixed == ("run.num_steps=2",)


def test_an_interval_needs_a_search():
    wanted = "learner.learning_rate=tag(log, interval(1e-5, 1e-3))"
    assert "a grid would need endless members. Use sweep=optuna" in complaint(wanted)
    [varied] = read_sweep(["sweep=optuna", wanted]).varied
    assert varied.interval == Interval(1e-5, 1e-3, is_integer=False, is_log=True)
    [varied] = read_sweep(["sweep=optuna", "rollout.num_leaves=interval(2,8)"]).varied
    assert varied.interval == Interval(2, 8, is_integer=True, is_log=False)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["seed=1"], "nothing varies, and a sweep of one run is a run"),
        (["seed=1,2", "run.dir=here"], "all members would share one folder"),
        (["seed=1,2", "run.max_restarts=1"], "set sweep.max_retries"),
        (["run.name=a,b"], "a sweep has one run.name"),
        (["sweep.parallel=1,2"], "a sweep has one sweep.parallel"),
        (["seed=shuffle(1,2,3)"], "would shuffle anew each time"),
        (["seed=range(1,5,0)"], "the step of a range must not be 0"),
        (["credit=glob(nothing*)"], "stands for no value at all"),
        (["seed=1,2", "seed=3,4"], "seed varies twice"),
        (["sweep=optuna", "seed=interval(1,9)"], "the best seed is luck"),
        (["sweep=optuna", "learner.learning_rate=tag(log, interval(0.0, 1.0))"], "it must begin above 0"),
        (["sweep=optuna", "learner.learning_rate=interval(2.0, 1.0)"], "varies from 2 to 1: nothing"),
        (["seed=range(0,200)", "learner.epochs=range(0,200)"], "40,000 combinations are more than the 10,000"),
    ],
)
def test_what_cannot_be_swept_says_why(words: list[str], part: str):
    assert part in complaint(*words)


def test_a_setting_of_a_part_that_is_not_there_names_the_part():
    cfg = compose(["credit=grpo"])
    assert lacking_entry(cfg, "credit.terms.fork.weight") == "credit.terms.fork"
    assert lacking_entry(cfg, "credit.terms.trajectory.weight") == ""
    assert lacking_entry(cfg, "credit.terms.trajectory.signals.step.scale") == "credit.terms.trajectory.signals.step"
    assert lacking_entry(cfg, "rewards.sources.mine.weight") == "rewards.sources.mine"
    assert lacking_entry(cfg, "credit.terms.fork") == ""  # a whole new term
    assert lacking_entry(cfg, "learner.learning_rate") == lacking_entry(cfg, "no.such.key") == ""
