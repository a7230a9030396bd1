from __future__ import annotations

import pytest

from conf.check_evaluation import chosen_by_a_source, ks_can_be_drawn, samples_can_differ
from conf.compose import compose
from conf.schema import Config


def config(*overrides: str) -> Config:
    return compose(["experiment=hop_search", *overrides])


@pytest.mark.parametrize("settings", [[], ["run.eval_samples=8", "run.eval_k=[1,8]", "run.eval_score=progress"]])
def test_what_can_be_evaluated_is_let_pass(settings: list[str]):
    cfg = config(*settings)
    assert [rule(cfg) for rule in (ks_can_be_drawn, chosen_by_a_source, samples_can_differ)] == [[], [], []]


@pytest.mark.parametrize(("k", "way_out"), [(8, "run.eval_samples=8"), (0, "Give k from 1 to 4.")])
def test_no_more_are_drawn_than_there_are(k: int, way_out: str):
    [found] = ks_can_be_drawn(config("run.eval_samples=4", f"run.eval_k=[1,{k}]"))
    assert found.fatal and f"run.eval_k holds {k} and run.eval_samples=4" in found.text and way_out in found.text


def test_best_of_k_goes_by_a_source_that_there_is():
    [found] = chosen_by_a_source(config("run.eval_samples=4", "run.eval_score=progres"))
    assert found.fatal and 'Did you mean "progress"?' in found.text
    [found] = chosen_by_a_source(config("run.eval_score=progress"))
    assert not found.fatal and "leaves no choice" in found.text


def test_best_of_k_may_go_by_the_model_that_the_run_trains():
    cfg = config("run.eval_samples=4", "run.eval_score=mine", "rewards.sources.mine.prm=true")
    assert chosen_by_a_source(cfg) == []


def test_greedy_samples_are_one_sample():
    [found] = samples_can_differ(config("run.eval_samples=4", "run.eval_temperature=0"))
    assert not found.fatal and "greedy trajectories differ by chance" in found.text
