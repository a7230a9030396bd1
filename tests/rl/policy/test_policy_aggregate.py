from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conf.errors import ShapeError
from conf.schema import Aggregation
from rl.policy.aggregate import aggregate


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    "mode, loss",
    [
        ("token_mean", 2.5),  # (1 + 2 + 3 + 4) / 4
        ("seq_mean_token_sum", 5.0),  # (6 + 4) / 2
        ("seq_mean_token_mean", 3.0),  # (2 + 4) / 2
        ("seq_mean_token_sum_norm", 5 / 3),  # 5 / 3; verl before 0.10 gave 10 / 3
    ],
)
def test_published_values_of_two_sequences(mode: str, loss: float):
    # Steps of one token with losses 1 2 3, and one with loss 4; horizon 3.
    found = aggregate(
        Aggregation(mode),
        weight_P=torch.ones(4),
        tokens_P=torch.ones(4, dtype=torch.int64),
        pair_leaf_P=index(0, 0, 0, 1),
        tree_L=index(0, 0),
        num_trees=1,
        horizon_tokens=3,
    )
    total = (found.factor_P * tensor(1, 2, 3, 4)).sum() / found.denominator_G.sum()
    assert total.item() == pytest.approx(loss)


def test_a_shared_step_that_counts_once_leaves_each_trajectory_one():
    # Two trajectories share a step of 2 tokens, at weight 1/2 each, and go on with 1 and 3 tokens of their own.
    found = aggregate(
        Aggregation.seq_mean_token_mean,
        weight_P=tensor(0.5, 1, 0.5, 1),
        tokens_P=index(2, 1, 2, 3),
        pair_leaf_P=index(0, 0, 1, 1),
        tree_L=index(0, 0),
        num_trees=1,
        horizon_tokens=0,
    )
    assert found.factor_P.tolist() == pytest.approx(
        [1 / 2, 1 / 2, 1 / 4, 1 / 4]
    )  # 1 / (0.5 * 2 + 1), 1 / (0.5 * 2 + 3)
    assert found.denominator_G.tolist() == [2]


def test_denominators_of_trees_and_trajectories_without_weight():
    # Tree 0 has a trained trajectory of 3 tokens and one without weight; tree 1 has one of 4 tokens at weight 1/2.
    pairs = {
        "weight_P": tensor(1, 0, 0.5),
        "tokens_P": index(3, 5, 4),
        "pair_leaf_P": index(0, 1, 2),
        "tree_L": index(0, 0, 1),
        "num_trees": 3,
        "horizon_tokens": 10,
    }
    expected = {
        Aggregation.token_mean: [3, 2, 0],
        Aggregation.seq_mean_token_mean: [1, 1, 0],
        Aggregation.seq_mean_token_sum: [1, 1, 0],
        Aggregation.seq_mean_token_sum_norm: [10, 10, 0],
    }
    for mode, denominators in expected.items():
        found = aggregate(mode, **pairs)
        assert found.denominator_G.tolist() == denominators
        assert found.factor_P.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 2), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_loss_of_one_everywhere_has_the_mean_one(pairs: list[tuple[float, int, int]]):
    weight_P, tokens_P = tensor(*(weight for weight, _, _ in pairs)), index(*(tokens for _, tokens, _ in pairs))
    for mode in (Aggregation.token_mean, Aggregation.seq_mean_token_mean):
        leaf_P = index(*(leaf for *_, leaf in pairs))
        found = aggregate(mode, weight_P, tokens_P, leaf_P, index(0, 0, 1, 1), num_trees=2, horizon_tokens=0)
        total = (weight_P * found.factor_P * tokens_P).sum() / found.denominator_G.sum()
        assert total.item() == pytest.approx(1.0)


def test_pairs_of_another_batch_are_refused():
    with pytest.raises(ShapeError, match="weight_P has P=2"):
        aggregate(Aggregation.token_mean, tensor(1, 1), index(1), index(0, 0), index(0), num_trees=1, horizon_tokens=0)
