"""Steps cut in two, and candidates that were not chosen, from the tree to the packed tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from credit_forests import balanced, credit_of, recipe

from rewards.drawn import parse_scored, row_of
from rewards.types import Score, ScoredTree
from rl.credit.assign import Credit
from rl.credit.forest import Forest
from rl.policy.pack import TreeCredit, pack
from rollout.tree import Tree, split
from rollout.types import StopReason


def lengthened(scored: ScoredTree, size: int) -> ScoredTree:
    """The same tree with steps of so many tokens."""
    nodes = [
        replace(
            node,
            action_ids=[100 * row + number for number in range(size)],
            action_logprobs=[-0.1 * (number + 1) for number in range(size)],
        )
        for row, node in enumerate(scored.tree.nodes)
    ]
    return replace(scored, tree=replace(scored.tree, nodes=nodes))


def cut(scored: ScoredTree, row: int, token: int) -> ScoredTree:
    """The same tree with a step cut in two; scores stay with the rest, which has its facts."""

    def moved(table: dict[str, dict[int, Score]]) -> dict[str, dict[int, Score]]:
        return {name: {at + (at >= row): score for at, score in by_row.items()} for name, by_row in table.items()}

    return replace(
        scored,
        tree=split(scored.tree, row, token),
        step_signals=moved(scored.step_signals),
        leaf_signals=moved(scored.leaf_signals),
    )


def tree_credit(tree: Tree, forest: Forest, credit: Credit) -> TreeCredit:
    weights = {name: [0.0] * len(tree.nodes) for name in ("w_pos", "w_neg", "w0")}
    for name, by_row in weights.items():
        for row, value in zip(forest.row_N.tolist(), getattr(credit, f"{name}_N").tolist(), strict=True):
            by_row[row] = value
    return TreeCredit(tree=tree, **weights)


def packed(scored: ScoredTree, name: str) -> dict[str, list[float]]:
    forest, credit = credit_of(recipe(name), scored)
    batch = pack([tree_credit(scored.tree, forest, credit)])
    fields: Iterable[str] = (
        "input_ids_T",
        "position_T",
        "end_T",
        "edge_row_E",
        "edge_target_E",
        "w_pos_E",
        "w_neg_E",
        "w0_E",
        "old_logprob_E",
    )
    return {field: getattr(batch, field).tolist() for field in fields}


@pytest.mark.parametrize("name", ["grpo", "tree_grpo", "tree_po", "dr_grpo"])
@pytest.mark.parametrize("row", [0, 1, 5])
def test_where_trajectories_are_compared_a_cut_changes_no_token_of_the_batch(name: str, row: int):
    scored = lengthened(balanced(), 4)
    whole, parts = packed(scored, name), packed(cut(scored, row, 1), name)
    if name == "tree_po":  # it compares at each ancestor, and a cut makes one more: tokens and weights alone are equal
        for each in (whole, parts):
            del each["w_pos_E"], each["w_neg_E"]
    for field, values in whole.items():
        assert parts[field] == pytest.approx(values), field


def test_a_branch_inside_a_turn_is_credited_from_where_it_begins():
    # a is cut behind its first token and a second rest grows there: outcomes 1 and 0 behind it, 0 behind b
    scored = cut(lengthened(parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0}), 3), 0, 1)
    tree = scored.tree
    tree.nodes.insert(2, replace(tree.nodes[1], action_ids=[7, 8], action_logprobs=[-1.0, -1.0]))
    (name, by_row), *_ = scored.leaf_signals.items()
    assert sorted(by_row) == [1, 2]
    signals = {name: {1: by_row[1], 2: Score(0.0), 3: by_row[2]}}
    forest, credit = credit_of(recipe("spo_tree"), replace(scored, leaf_signals=signals))
    # values: the beginning 1/2, the prompt 1/4; gains: beginning +1/4, its rests +-1/2, b -1/4
    assert forest.parent_N.tolist() == [-1, 0, 0, -1]
    assert credit.advantage_N.tolist() == [0.25, 0.5, -0.5, -0.25]


def test_candidates_that_were_not_chosen_train_by_what_is_said_of_the_step():
    scored = parse_scored(
        "q -> (a, b -> (c, d))",
        stops={"a": StopReason.not_chosen, "c": StopReason.not_chosen},
        steps={"a": 2.0, "b": 0.0, "c": 1.0, "d": 3.0},
    )
    (name, by_row), *_ = scored.step_signals.items()
    scored = replace(scored, step_signals={"judge": by_row})
    tree = scored.tree
    assert name and tree.trained_leaves() == [row_of(tree, each) for each in ("a", "c", "d")]
    assert tree.outcome_leaves() == [row_of(tree, "d")]
    _, credit = credit_of(recipe("slate"), scored)
    z = 0.5**0.5
    assert credit.advantage_N.tolist() == pytest.approx([z, -z, -z, z], abs=1e-4)
    assert credit.w0_N.tolist() == [1, 1, 1, 1]
