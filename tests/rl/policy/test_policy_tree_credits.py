from __future__ import annotations

import pytest

from conf.schema import (
    Aggregation,
    Correction,
    CreditConfig,
    GaeConfig,
    GaeLevel,
    LossConfig,
    LossKind,
    Normalizer,
    SignalUse,
    TermConfig,
)
from rewards.drawn import parse_scored, row_of
from rewards.types import ScoredTree
from rl.credit.assign import assign
from rl.credit.forest import forest_of
from rl.credit.measured import Measured, with_measured
from rl.policy.pack import TreeCredit
from rl.policy.tree_credits import tree_credits

CENTERED = CreditConfig(terms={"all": TermConfig(signals={"outcome": SignalUse()}, normalizer=Normalizer.center)})
"""On the balanced tree, right only at a1: 0.75 for a1's trajectory and -0.25 for the three others."""


def balanced() -> ScoredTree:
    tree = "prompt -> (a -> (a1, a2), b -> (b1, b2))"
    return parse_scored(tree, outcomes={"a1": 1.0, "a2": 0.0, "b1": 0.0, "b2": 0.0})


def weighed(loss: LossConfig, max_context_tokens: int = 10) -> TreeCredit:
    scored = balanced()
    forest = forest_of([scored])
    credit = assign(forest, CENTERED, max_steps=4)
    (found,) = tree_credits([scored.tree], forest, credit, loss, max_context_tokens)
    return found


def test_a_mean_over_tokens_counts_each_trajectory_through_a_step():
    found = weighed(LossConfig())
    a, a1 = (row_of(found.tree, name) for name in ("a", "a1"))
    assert (found.w_pos[a], found.w_neg[a], found.w0[a]) == (0.75, -0.25, 2.0)
    assert (found.w_pos[a1], found.w_neg[a1], found.w0[a1]) == (0.75, 0.0, 1.0)
    assert found.denominator == 8.0  # four trajectories of two one-token steps
    assert found.paths == []


def test_a_mean_over_trajectories_counts_each_as_one():
    found = weighed(LossConfig(aggregation=Aggregation.seq_mean_token_mean))
    a1 = row_of(found.tree, "a1")
    assert found.w0[a1] == 0.5  # one of its trajectory's two tokens
    assert found.denominator == 4.0


def test_without_a_horizon_sums_are_divided_by_the_longest_path_allowed():
    norm = Aggregation.seq_mean_token_sum_norm
    assert weighed(LossConfig(aggregation=norm), max_context_tokens=10).denominator == 40.0
    assert weighed(LossConfig(aggregation=norm, horizon_tokens=3), max_context_tokens=10).denominator == 12.0


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(kind=LossKind.gspo),
        LossConfig(kind=LossKind.custom),
        LossConfig(correction=Correction.sequence_mask),
    ],
)
def test_losses_of_whole_trajectories_get_them_one_by_one(loss: LossConfig):
    found = weighed(loss)
    by_leaf = {found.tree.nodes[path.leaf].action_text: path for path in found.paths}
    assert sorted(by_leaf) == ["a1", "a2", "b1", "b2"]
    assert by_leaf["a1"].advantage == [0.75, 0.75]
    assert by_leaf["b2"].advantage == [-0.25, -0.25]
    assert by_leaf["a1"].weight == [1.0, 1.0]


def test_the_sums_are_those_of_the_trajectories():
    found = weighed(LossConfig(kind=LossKind.gspo, aggregation=Aggregation.seq_mean_token_mean))
    again = found.only_paths(found.paths)
    assert (again.w_pos, again.w_neg, again.w0) == (
        pytest.approx(found.w_pos),
        pytest.approx(found.w_neg),
        pytest.approx(found.w0),
    )


def test_a_critic_brings_tokens():
    scored = balanced()
    gae = GaeConfig(level=GaeLevel.token, signals={"outcome": SignalUse()}, lam=1.0, whiten=False)
    values = [[0.25] if node.action_text == "a1" else [0.0] for node in scored.tree.nodes]
    forest = with_measured(forest_of([scored]), [Measured(value=values)])
    credit = assign(forest, CreditConfig(gae=gae), max_steps=4)
    (found,) = tree_credits([scored.tree], forest, credit, LossConfig(), 10)
    a, a1 = (row_of(found.tree, name) for name in ("a", "a1"))
    assert found.tokens is not None
    assert (found.tokens.value[a1], found.tokens.target[a1]) == ([0.25], [1.0])
    by_leaf = {found.tree.nodes[path.leaf].action_text: path for path in found.paths}
    # a: half of its trajectories end right and its value is 0; a1: right, and half-way expected
    assert by_leaf["a1"].advantage == [0.5, 0.75]
    assert found.w_pos[a] == pytest.approx(1.0)  # 0.5 for each of its two trajectories
