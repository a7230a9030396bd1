"""The benchmarks of credit: they run, their baseline gives Grove's numbers, and intervals are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.testing import assert_close

from benchmarks import credit, recipes, tables
from conf.checks import problems
from conf.compose import compose
from rl.credit.assign import assign
from rl.credit.forest import forest_of


def test_the_loop_over_groups_gives_the_same_advantages():
    cfg = compose(["credit=grpo"])
    for parents in credit.SHAPES.values():
        forest = forest_of(credit.random_trees(parents, num_trees=3))
        expected = assign(forest, cfg.credit, cfg.rollout.max_steps).advantage_P
        assert_close(credit.looped_grpo(forest).float(), expected)


def test_trees_have_64_steps():
    assert {len(parents) for parents in credit.SHAPES.values()} == {64}


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "OUT", tmp_path)
    credit.main(["--quick", "--recipes", "grpo", "tree_step"])
    assert (tmp_path / "quick_credit.json").exists()


@pytest.mark.parametrize(
    ("launch", "name"), [(launch, name) for launch in recipes.RECIPES for name in recipes.RECIPES[launch]]
)
def test_every_recipe_can_be_trained(launch: tuple[str, ...], name: str):
    cfg = recipes.config(name, seed=0, tokens=1000, launch=launch)
    assert [problem.text for problem in problems(cfg) if problem.fatal] == []


def test_intervals_by_hand():
    # means .8 and .6; both deviate by .1, so 2.776 * .1 / sqrt(3) from the four degrees of freedom of both
    best, other = recipes.rows({"grpo": [0.5, 0.6, 0.7], "tree_step": [0.7, 0.8, 0.9]})
    assert (best["name"], other["name"]) == ("tree_step", "grpo")
    assert best["after"] == pytest.approx(0.8)
    assert best["interval"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert best["pooled"] == pytest.approx(2.776 * 0.1 / 3**0.5, rel=1e-3)
    assert best["against_grpo"] == pytest.approx(0.2)
