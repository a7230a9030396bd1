import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from credit_forests import balanced, credit_config, credit_of, per_node, per_pair
from torch import Tensor

from conf.check_credit import functions_can_be_loaded, term_faults
from conf.compose import compose
from conf.errors import ConfigError
from conf.schema import CreditConfig
from rewards.types import Score
from rl.credit.forest import Forest

HERE = f"{Path(__file__).resolve()}"


def leaves(forest: Forest, scale: float = 1.0) -> Tensor:
    return scale * forest.leaf_signals["outcome"]


def depths(forest: Forest) -> Tensor:
    return forest.depth_N.double()


def pairs(forest: Forest) -> Tensor:
    return forest.leaf_signals["outcome"][forest.pair_leaf_P] + forest.depth_N[forest.pair_node_P]


def whole_numbers(forest: Forest) -> Tensor:
    return forest.depth_N


def infinite(forest: Forest) -> Tensor:
    return torch.full((len(forest.parent_N),), math.inf)


def wrong_signal(forest: Forest) -> Tensor:
    return forest.step_signals["judge"]


def plain_list(forest: Forest) -> list[float]:
    return [0.0] * len(forest.parent_N)


def term(name: str, **settings: Any) -> CreditConfig:
    fields = {"fn": f"{HERE}:{name}", "signals": {"outcome": {}}, "normalizer": "none", **settings}
    return credit_config({"terms": {"mine": fields}})


def test_a_function_of_trajectories_gives_every_step_of_their_paths_its_value():
    tree = balanced()
    forest, credit = credit_of(term("leaves", args={"scale": 3.0}), tree)
    assert per_pair(forest, credit.advantage_P, tree)["a1", "a"] == 3
    assert per_node(forest, credit.advantage_N, tree)["a"] == 1.5  # a1 earns 3, a2 nothing


def test_what_it_says_is_compared_like_any_other_value():
    tree = balanced()
    forest, credit = credit_of(term("depths", level="step", scope="siblings", normalizer="center"), tree)
    assert credit.advantage_N.tolist() == [0.0] * 6  # siblings are equally deep
    forest, credit = credit_of(term("depths", level="step", normalizer="center"), tree)
    assert per_node(forest, credit.advantage_N, tree)["a"] == pytest.approx(1 - 10 / 6)  # depths 1, 1, 2, 2, 2, 2
    forest, credit = credit_of(term("leaves", scope="ancestors", normalizer="center"), tree)
    # below the prompt 1 - 1/4, below a 1 - 1/2; below a1 it is alone
    assert per_pair(forest, credit.advantage_P, tree)["a1", "a1"] == pytest.approx((0.75 + 0.5) / 2)


def test_without_backup_a_step_may_differ_between_its_trajectories():
    tree = balanced()
    forest, credit = credit_of(term("pairs", level="step", backup="none"), tree)
    advantage = per_pair(forest, credit.advantage_P, tree)
    assert (advantage["a1", "a"], advantage["a2", "a"], advantage["a1", "a1"]) == (2, 1, 3)


def test_where_it_says_nothing_nothing_trains():
    tree = balanced(outcomes={"a1": Score.failed("down"), "a2": 1.0, "b1": 0.0, "b2": 0.0})
    forest, credit = credit_of(term("leaves"), tree)
    weight = per_pair(forest, credit.weight_P, tree)
    assert {pair for pair, value in weight.items() if value == 0} == {("a1", "a"), ("a1", "a1")}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("depths", {}, r"shape \[6\], but needs one value for each of 4 trajectories"),
        ("depths", {"level": "step", "backup": "none"}, r"each of 8 pairs"),
        ("whole_numbers", {"level": "step"}, "int64, in which nothing can be NaN"),
        ("infinite", {"level": "step"}, "returned inf"),
        ("wrong_signal", {"level": "step"}, "raised KeyError: 'judge'"),
        ("plain_list", {"level": "step"}, "returned list, not a tensor"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_functions_name(name: str, settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as error:
        credit_of(term(name, **settings), balanced())
    assert f":{name}" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.9}, "gamma=0.9 would change nothing"),
        ({"level": "step", "returns": "to_go"}, "returns=to_go would change nothing"),
        ({"signals": {"outcome": {"scale": 2.0}}}, "not read as it is would change nothing"),
        ({"level": "step", "scope": "parent_value", "normalizer": "center"}, "scope=parent_value needs a value"),
        ({"fn": "", "args": {"scale": 1}}, "args are for fn, which is empty"),
    ],
)
def test_settings_that_it_would_not_read_are_refused(settings: dict[str, Any], message: str):
    assert any(message in fault for fault in term_faults(term("leaves", **settings)))


@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        ("nowhere.py:leaves", {}, "there is no file"),
        (f"{HERE}:leavs", {}, 'Did you mean ".*:leaves"'),
        (f"{HERE}:leaves", {"sclae": 2}, "cannot be called with a forest, sclae"),
        (f"{HERE}:HERE", {}, "cannot be called"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_starts(
    fn: str, args: dict[str, Any], message: str
):
    cfg = compose(["experiment=hop_search"])
    cfg.credit = term("leaves", fn=fn, args=args)
    (problem,) = functions_can_be_loaded(cfg)
    assert re.search(message, problem.text)


def test_a_loss_function_that_does_not_exist_is_refused_too():
    cfg = compose(["loss.kind=custom", "loss.fn=nowhere.py:loss"])
    (problem,) = functions_can_be_loaded(cfg)
    assert "nowhere.py" in problem.text
