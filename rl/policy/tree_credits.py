"""From credit on a forest to what the learner trains on: each tree with its weights, as the loss aggregates them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conf.schema import Correction, LossConfig, LossKind
from rl.credit.assign import Credit
from rl.credit.forest import Forest
from rl.policy.aggregate import aggregate
from rl.policy.pack import PathCredit, TokenCredit, TreeCredit
from rollout.tree import Tree

PATH_LOSSES = (LossKind.gspo, LossKind.custom)
PATH_CORRECTIONS = (Correction.sequence_truncate, Correction.sequence_mask)


def tree_credits(
    trees: Sequence[Tree], forest: Forest, credit: Credit, loss: LossConfig, max_context_tokens: int
) -> list[TreeCredit]:
    """Each tree with the loss weights of its rows, 0 for rows that are not trained.

    Trajectories come one by one only where something needs them: a loss or a correction of whole trajectories, or a
    critic, whose advantages differ from token to token.

    Args:
        trees: of the batch that `forest` was made of, in its order.
        credit: of that forest.
        max_context_tokens: the horizon of seq_mean_token_sum_norm where loss.horizon_tokens is 0.
    """
    found = aggregate(
        loss.aggregation,
        credit.weight_P,
        forest.num_actions_N[forest.pair_node_P],
        forest.pair_leaf_P,
        forest.prompt_L,
        num_trees=len(trees),
        horizon_tokens=loss.horizon_tokens or max_context_tokens,
    )
    weight_P, advantage_P = credit.weight_P.double() * found.factor_P, credit.advantage_P.double()
    sums_N = [
        weight_P.new_zeros(len(forest.parent_N)).index_add(0, forest.pair_node_P, weight_P * part_P)
        for part_P in (advantage_P.clamp(min=0), advantage_P.clamp(max=0), torch.ones_like(weight_P))
    ]
    places = list(zip(forest.prompt_N.tolist(), forest.row_N.tolist(), strict=True))
    tables = [[[0.0] * len(tree.nodes) for tree in trees] for _ in sums_N]
    for table, sum_N in zip(tables, sums_N, strict=True):
        for (number, row), value in zip(places, sum_N.tolist(), strict=True):
            table[number][row] = value
    apart = loss.kind in PATH_LOSSES or loss.correction in PATH_CORRECTIONS or credit.critic is not None
    paths = _paths(forest, advantage_P, weight_P, len(trees)) if apart else [[] for _ in trees]
    tokens = _tokens(trees, places, credit) if credit.critic is not None else [None] * len(trees)
    parts = zip(trees, *tables, paths, tokens, found.denominator_G.tolist(), strict=True)
    return [
        TreeCredit(
            tree=tree,
            w_pos=w_pos,
            w_neg=w_neg,
            w0=w0,
            paths=tree_paths,
            tokens=tree_tokens if tree_paths else None,
            denominator=denominator,
        )
        for tree, w_pos, w_neg, w0, tree_paths, tree_tokens, denominator in parts
    ]


def _paths(forest: Forest, advantage_P: Tensor, weight_P: Tensor, num_trees: int) -> list[list[PathCredit]]:
    """Of each tree; pairs are sorted by trajectory and, within it, from the first step to the last."""
    paths: list[list[PathCredit]] = [[] for _ in range(num_trees)]
    lengths = forest.pair_leaf_P.bincount(minlength=len(forest.leaf_node_L)).tolist()
    for leaf, (advantages, weights) in enumerate(zip(advantage_P.split(lengths), weight_P.split(lengths), strict=True)):
        row = int(forest.row_N[forest.leaf_node_L[leaf]])
        path = PathCredit(leaf=row, advantage=advantages.tolist(), weight=weights.tolist())
        paths[int(forest.prompt_L[leaf])].append(path)
    return paths


def _tokens(trees: Sequence[Tree], places: list[tuple[int, int]], credit: Credit) -> list[TokenCredit]:
    critic = credit.critic
    assert critic is not None, "asked for with a critic alone"
    found = [
        TokenCredit(**{name: [[] for _ in tree.nodes] for name in ("advantage", "value", "target")}) for tree in trees
    ]
    for name, value_T in (("advantage", critic.extra_T), ("value", critic.value_T), ("target", critic.target_T)):
        for (number, row), values in zip(places, critic.by_node(value_T), strict=True):
            getattr(found[number], name)[row] = values
    return found
