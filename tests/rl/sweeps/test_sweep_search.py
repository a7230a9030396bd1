"""A search over played members whose curves are made up: what it tries, gives up, and takes for the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from rich.console import Console

from conf.errors import ConfigError
from conf.sweep import Interval, Sweep, Varied, read_sweep
from rl.sweeps.record import MemberRecord, Status, SweepRecord, open_record
from rl.sweeps.run import SweepRun
from rl.sweeps.search import Search, check_search, distribution
from rl.sweeps.show import Show

pytestmark = pytest.mark.slow

TOKENS = 1000
RATE = "learner.learning_rate=interval(0.0, 1.0)"


class Trainer:
    """A played member: success rises linearly to `1 - |rate - 0.3|` after all tokens, an evaluation at each poll."""

    def __init__(self, record: SweepRecord, member: MemberRecord) -> None:
        self.folder, self.polls, self.stopped = record.folder(member), 0, False
        rate = float(member.values["learner.learning_rate"])
        self.goal = 1 - abs(rate - 0.3) + 0.01 * int(member.values.get("seed", "0"))
        self.folder.path.mkdir(parents=True, exist_ok=True)

    def poll(self) -> int | None:
        if self.stopped:
            return 130
        tokens = 100 * self.polls
        row = {"step": self.polls, "rollout/total_generated_tokens": tokens, "eval/success_share": 0.0}
        row["eval/success_share"] = self.goal * tokens / TOKENS
        with self.folder.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.polls += 1
        if tokens < TOKENS:
            return None
        self.folder.write_summary({"success_after": self.goal})
        return 0

    def silent_s(self) -> float:
        return 0.0

    def stop(self) -> None:
        self.stopped = True

    kill = stop


class Clock:
    def __init__(self, interrupt_after_s: float = 1e9) -> None:
        self.now, self.limit = 0.0, interrupt_after_s

    def sleep(self, seconds: float) -> None:
        self.now += 3.0  # more than the seconds between two looks at the curves
        if self.now > self.limit:
            self.limit = 1e9
            raise KeyboardInterrupt


def searched(folder: Path, *words: str, interrupt_after_s: float = 1e9) -> tuple[Search, SweepRecord]:
    sweep = read_sweep([f"sweep.dir={folder}", "sweep=optuna", *(words or (RATE,))])
    record, clock = open_record(sweep, []), Clock(interrupt_after_s)
    search = Search(sweep, record, 10, TOKENS)
    show = Show(record, Console(quiet=True))
    run = SweepRun(sweep, record, show, search, lambda *args: Trainer(*args[:2]), lambda: clock.now, clock.sleep)
    run.run()
    search.settle()
    return search, record


def test_trials_come_to_an_end_and_the_best_is_near_the_truth(tmp_path: Path):
    search, record = searched(tmp_path, RATE, "sweep.num_trials=12", "sweep.pruner=none")
    assert [each.name for each in record.members] == [f"trial{number:03d}" for number in range(12)]
    assert record.count(Status.finished) == 12
    best = search.best()
    assert best is not None
    number, value, values = best
    rate = float(values["learner.learning_rate"])
    assert record.members[number].values == values and value == pytest.approx(1 - abs(rate - 0.3))
    assert value == max(1 - abs(float(each.values["learner.learning_rate"]) - 0.3) for each in record.members)


def test_hopeless_trials_are_stopped_and_marked_and_cost_less(tmp_path: Path):
    words = (RATE, "sweep.num_trials=12", "sweep.startup_trials=4")
    search, record = searched(tmp_path, *words)
    pruned = [each for each in record.members if each.status is Status.pruned]
    assert pruned and record.count(Status.finished, Status.pruned) == 12
    assert all(each.trial >= 4 for each in pruned if each.trial is not None), "nothing to compare with before"
    for each in pruned:
        rows = record.folder(each).metrics.read_text().splitlines()
        assert len(rows) < 11 and each.reason == "its curve fell behind earlier trials"
    finished = [each for each in record.members if each.status is Status.finished]
    assert search.best()[0] in [each.trial for each in finished]  # type: ignore[index]


def test_a_trial_trains_all_seeds_and_is_worth_their_mean(tmp_path: Path):
    words = (RATE, "seed=1,2,3", "sweep.num_trials=3", "sweep.pruner=none")
    search, record = searched(tmp_path, *words)
    assert [each.name for each in record.members[:4]] == [
        *("trial000-seed1", "trial000-seed2", "trial000-seed3", "trial001-seed1"),
    ]
    _, value, values = search.best()  # type: ignore[misc]
    assert value == pytest.approx(1 - abs(float(values["learner.learning_rate"]) - 0.3) + 0.02)


def test_a_search_that_was_stopped_goes_on_and_draws_what_it_would_have_drawn(tmp_path: Path):
    words = (RATE, "sweep.num_trials=6", "sweep.pruner=none")
    _, whole = searched(tmp_path / "whole", *words)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "halves", *words, interrupt_after_s=100)
    search, halves = searched(tmp_path / "halves", *words)
    assert [each.values for each in halves.members] == [each.values for each in whole.members]
    assert halves.count(Status.finished) == 6 and search.best() is not None


def test_a_trial_drawn_in_the_moment_of_the_kill_is_drawn_anew(tmp_path: Path):
    sweep = read_sweep([f"sweep.dir={tmp_path}", "sweep=optuna", RATE, "sweep.num_trials=2"])
    record = open_record(sweep, [])
    lost = Search(sweep, record, 10, TOKENS).ask()  # and never written to sweep.json
    assert lost is not None and lost[0].name == "trial000"
    _, record = searched(tmp_path, RATE, "sweep.num_trials=2")
    assert [each.name for each in record.members] == ["trial001", "trial002"]


def sweep_of(*words: str) -> Sweep:
    return read_sweep(["sweep=optuna", *words])


def test_the_objective_is_read_at_equally_many_tokens(tmp_path: Path):
    search, record = searched(tmp_path, RATE, "sweep.num_trials=1")
    record.folder(record.members[0]).metrics.write_text(
        "".join(
            json.dumps({"step": step, "rollout/total_generated_tokens": tokens, "eval/success_share": share}) + "\n"
            for step, tokens, share in ((0, 0, 0.0), (1, 900, 0.4), (2, 1100, 0.8))
        )
    )
    assert search.objective(record.members[0]) == pytest.approx(0.6)  # half-way from 900 to 1100 tokens
    # four checks at 200, 400, 600 and 800 tokens, on the line from 0 to 0.4 at 900
    curve = [(0.0, 0.0), (900.0, 0.4)]
    assert search.values_at_checks(curve) == pytest.approx([0.4 * tokens / 900 for tokens in (200, 400, 600, 800)])
    assert search.values_at_checks([(0.0, 0.0), (500.0, 0.4)]) == pytest.approx([0.16, 0.32])


def test_what_varies_becomes_what_optuna_draws_from():
    assert distribution(Varied("a", ("x", "y"))) == CategoricalDistribution(("x", "y"))
    wide = Interval(1e-5, 1e-3, is_integer=False, is_log=True)
    assert distribution(Varied("a", (), wide)) == FloatDistribution(1e-5, 1e-3, log=True)
    assert distribution(Varied("a", (), Interval(2, 8, is_integer=True, is_log=False))) == IntDistribution(2, 8)


def test_a_search_says_what_it_cannot_judge_by(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run.eval_every_steps=0 measures it before and after alone"):
        check_search(sweep_of(RATE), eval_every_steps=0)
    check_search(sweep_of(RATE, "sweep.pruner=none"), eval_every_steps=0)
    with pytest.raises(ConfigError, match=r'the metric "eval/nothing" is written by no run'):
        check_search(sweep_of(RATE, "sweep.metric=eval/nothing"), eval_every_steps=5)
    with pytest.raises(ConfigError, match="is better neither high nor low"):
        check_search(sweep_of(RATE, "sweep.metric=rollout/trajectories"), eval_every_steps=5)
    with pytest.raises(ConfigError, match="only the seed varies"):
        searched(tmp_path, "seed=1,2")
