import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ShapeError
from rl.credit.returns import following, product_after, somewhere_after, to_go

PATHS = st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=6), max_size=4)
"""Rewards of each trajectory's steps."""


def pairs(paths: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    values = [value for path in paths for value in path]
    leaves = [leaf for leaf, path in enumerate(paths) for _ in path]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(leaves, dtype=torch.int64)


def test_return_is_the_decayed_sum_of_what_follows():
    # gamma .5: 1 + .5 * 2 + .25 * 4 = 3, 2 + .5 * 4 = 4, 4; the next trajectory starts anew
    assert to_go(*pairs([[1, 2, 4], [8]]), gamma=0.5).tolist() == [3, 4, 4, 8]


@settings(max_examples=20, deadline=None)
@given(paths=PATHS, gamma=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_returns_agree_with_a_sum_for_each_step(paths, gamma):
    slow = [
        sum(gamma**distance * reward for distance, reward in enumerate(path[place:]))
        for path in paths
        for place in range(len(path))
    ]
    assert to_go(*pairs(paths), gamma=gamma).tolist() == pytest.approx(slow, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(PATHS)
def test_products_agree_with_a_product_for_each_step(paths):
    slow = [float(torch.tensor(path[place + 1 :]).double().prod()) for path in paths for place in range(len(path))]
    assert product_after(*pairs(paths)).tolist() == pytest.approx(slow, abs=1e-6)


def test_what_is_true_of_a_step_is_somewhere_after_all_before_it():
    value_P, leaf_P = pairs([[0, 1, 0], [0], [1]])
    assert somewhere_after(value_P > 0, leaf_P).tolist() == [True, True, False, False, True]


def test_a_trajectory_goes_on_as_long_as_it_has_steps():
    _, leaf_P = pairs([[0, 0, 0], [0]])
    assert following(leaf_P, 1).tolist() == [True, True, False, False]
    assert following(leaf_P, 2).tolist() == [True, False, False, False]
    assert not following(leaf_P, 9).any()


def test_rewards_and_trajectories_must_be_of_the_same_pairs():
    with pytest.raises(ShapeError, match="reward_P has P=2"):
        to_go(torch.zeros(2), torch.zeros(3, dtype=torch.int64), gamma=1.0)
