"""Members are composed and checked before the first one starts."""

import pytest

from conf.errors import ConfigError
from conf.sweep import read_sweep
from rl.sweeps import plan as planning
from rl.sweeps.plan import corners, plan

pytestmark = pytest.mark.slow

CHEAP = ("rollout.num_workers=1", "rollout.engine=transformers")
WEIGHTS = ("credit=portool,grpo", "credit.terms.fork.weight=0.1,0.3,1", "seed=1,2,3")


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        plan(read_sweep([*CHEAP, *words]))
    return str(error.value)


def test_members_that_cannot_run_are_told_together_and_none_starts():
    text = refused("learner.learning_rate=-1,1e-3,-2", "seed=1,2")
    assert "4 of 6 members of this sweep cannot run, so none was started" in text
    assert "learning_rate-1-seed1, learning_rate-1-seed2\n    learner.learning_rate=-1.0 cannot be" in text
    assert "learning_rate-2-seed1" in text and "sweep.inapplicable=skip" in text and "=drop" not in text


def test_the_weight_of_a_term_that_a_recipe_lacks_is_refused_and_named():
    text = refused(*WEIGHTS)
    assert "9 of 18 members" in text and "sweep.inapplicable=drop" in text
    assert "credit.terms.fork.weight=0.1 is about credit.terms.fork, which is not there (there is trajectory)" in text


def test_drop_leaves_it_out_and_members_that_become_equal_are_one():
    found = plan(read_sweep([*CHEAP, *WEIGHTS, "sweep.inapplicable=drop"]))
    names = [member.name for member in found.members]
    assert len(names) == 3 * 3 + 3  # portool's three weights and grpo, with three seeds each
    assert names[-3:] == ["grpo-seed1", "grpo-seed2", "grpo-seed3"]
    assert "credit.terms.fork.weight" not in " ".join(found.members[-1].overrides)
    assert {key: len(members) for key, members in found.dropped.items()} == {"credit.terms.fork.weight": 9}


def test_skip_reports_them_and_keeps_the_others():
    found = plan(read_sweep([*CHEAP, *WEIGHTS, "sweep.inapplicable=skip"]))
    assert len(found.members) == 9
    assert {member.name.partition("-")[0] for member, _ in found.skipped} == {"grpo"}
    assert all("credit.terms.fork" in reason for _, reason in found.skipped)


def test_skipping_all_of_them_is_refused():
    assert "2 of 2 members" in refused("learner.learning_rate=-1,-2", "sweep.inapplicable=skip")


def test_a_search_is_checked_at_the_ends_of_what_it_may_try():
    sweep = read_sweep(["sweep=optuna", "learner.learning_rate=interval(0.1,1.0)", "credit=grpo,portool", "seed=1,2"])
    first = {"learner.learning_rate": "0.1", "credit": "grpo", "seed": "1"}
    changes = {"learner.learning_rate": "1.0"}, {"credit": "portool"}, {"seed": "2"}
    tried = [each for each in corners(sweep.varied) if each != first]
    assert tried == [first | change for change in changes]
    text = refused("sweep=optuna", "learner.learning_rate=interval(-1.0,1.0)", "credit=grpo,portool")
    assert "2 of 3 members" in text and "the ends of what the search may try" in text


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("sweep.parallel=0", "sweep.parallel=0 cannot be: it must be 1 or more"),
        ("sweep.max_retries=-1", "sweep.max_retries=-1 cannot be"),
        ("sweep.max_silent_s=0", "sweep.max_silent_s=0.0 cannot be: give seconds"),
    ],
)
def test_numbers_that_a_sweep_cannot_have(word: str, part: str):
    assert part in refused("seed=1,2", word)


def test_members_at_once_get_a_gpu_each_or_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "num_gpus", lambda: 2)
    assert "sweep.parallel=3 members at once, but there are 2 GPUs" in refused("seed=1,2,3", "sweep.parallel=3")
    assert len(plan(read_sweep([*CHEAP, "seed=1,2,3", "sweep.parallel=2"])).members) == 3
