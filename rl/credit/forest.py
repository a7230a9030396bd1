"""The trained part of a batch of scored trees, as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rewards.types import BROKEN, Score, ScoredTree, ScoreStatus
from rollout.tree import ROOT, Node, Tree

Signals = dict[str, dict[int, Score]]
"""signal -> row of a tree -> score."""

_UNASKED = Score.not_applicable()


@dataclass(kw_only=True, slots=True)
class Forest:
    """Every step on a trained path, every trained trajectory, and every pair of a step and a trajectory through it.

    Letters: N nodes (steps), L leaves (trajectories), P pairs, G trees of the batch. Nodes are in the order of their
    trees and, within a tree, of their rows, so that parents come before children; leaves likewise; pairs are sorted by
    leaf, then depth.
    """

    parent_N: Tensor
    """int64, row of the parent in this forest; -1 for a first step."""
    prompt_N: Tensor
    """int64, index of the node's tree in the batch. With `row_N` it says where the node came from."""
    row_N: Tensor
    """int64, row of the node in its tree."""
    branch_N: Tensor
    """int64, one id per (prompt, `Node.branch`)."""
    depth_N: Tensor
    """int64, 1 for a first step."""
    state_N: Tensor
    """int64, one id per prompt and observation that a step follows; where the environment said nothing, per fork."""
    num_leaves_N: Tensor
    """int64, trained trajectories through the node."""
    num_actions_N: Tensor
    """int64, sampled tokens of the node; T of all nodes together."""
    leaf_node_L: Tensor
    """int64, row in this forest of the step that ended the trajectory."""
    prompt_L: Tensor
    branch_L: Tensor
    length_L: Tensor
    """int64, steps of the trajectory (T_k)."""
    pair_node_P: Tensor
    pair_leaf_P: Tensor
    step_signals: dict[str, Tensor]
    """signal -> float64 [N], NaN where it was not scored."""
    step_failed: dict[str, Tensor]
    """signal -> bool [N], where a source failed or timed out; False where it was scored or had nothing to say."""
    leaf_signals: dict[str, Tensor]
    """signal -> float64 [L], NaN where it was not scored."""
    prompt_signals: dict[str, Tensor]
    """Step signal -> float64 [G], what it says of the prompt itself (row ROOT), NaN where it says nothing."""
    value_T: Tensor | None = None
    """float64 [T], what the critic said of the state before each sampled token, nodes one after the other; None without
    a critic (`rl.credit.measured`)."""


def forest_of(scored: list[ScoredTree]) -> Forest:
    """Lay the trained paths of a batch of scored trees out as tensors, in time linear in steps and pairs.

    A tree is one prompt's group, even where two trees of a batch ask the same question. Steps that were pruned, and
    trajectories that the world broke, are absent; a tree with no trained trajectory contributes nothing.
    """
    trees = [each.tree for each in scored]
    first_row_of = _first_rows(trees)
    nodes = [node for tree in trees for node in tree.nodes]
    parents = [
        -1 if node.parent == ROOT else first + node.parent
        for first, tree in zip(first_row_of, trees, strict=True)
        for node in tree.nodes
    ]
    leaves = [first + row for first, tree in zip(first_row_of, trees, strict=True) for row in tree.trained_leaves()]
    pairs = _pairs(_ids(parents), _ids(leaves))

    # A: all nodes of all trees. The rest is about those on trained paths alone.
    trained_A = torch.zeros(len(nodes), dtype=torch.bool)
    trained_A[pairs.node_A] = True
    place_A = trained_A.cumsum(0) - 1
    rows_N = trained_A.nonzero().flatten()
    rows = rows_N.tolist()
    assert all(nodes[row].kept for row in rows), "every step before a kept leaf is kept"
    prompt_A = torch.arange(len(trees)).repeat_interleave(_ids(len(tree.nodes) for tree in trees))
    prompt_N = prompt_A[rows_N]
    row_N = rows_N - _ids(first_row_of)[prompt_N]
    parent_A = _ids(parents)[rows_N]
    pair_node_P, leaf_node_L = place_A[pairs.node_A], place_A[_ids(leaves)]
    depth_N = torch.zeros_like(rows_N)
    depth_N[pair_node_P] = pairs.depth
    branch = _ids(nodes[row].branch for row in rows)
    branch_N = _renumbered(prompt_N * (int(branch.max()) + 1) + branch) if rows else branch

    places = list(zip(prompt_N.tolist(), row_N.tolist(), strict=True))
    step_signals, step_failed = _signals([tree.step_signals for tree in scored], places)
    leaf_signals, _ = _signals([tree.leaf_signals for tree in scored], [places[node] for node in leaf_node_L.tolist()])
    prompts = [(prompt, ROOT) for prompt in range(len(scored))]
    prompt_signals, _ = _signals([tree.step_signals for tree in scored], prompts)
    return Forest(
        parent_N=torch.where(parent_A >= 0, place_A[parent_A], -1) if rows else parent_A,
        prompt_N=prompt_N,
        row_N=row_N,
        branch_N=branch_N,
        depth_N=depth_N,
        state_N=_states(nodes, parent_A.tolist(), prompt_N.tolist()),
        num_leaves_N=pair_node_P.bincount(minlength=len(rows)),
        num_actions_N=_ids(len(nodes[row].action_ids) for row in rows),
        leaf_node_L=leaf_node_L,
        prompt_L=prompt_N[leaf_node_L],
        branch_L=branch_N[leaf_node_L],
        length_L=depth_N[leaf_node_L],
        pair_node_P=pair_node_P,
        pair_leaf_P=pairs.leaf,
        step_signals=step_signals,
        step_failed=step_failed,
        leaf_signals=leaf_signals,
        prompt_signals=prompt_signals,
    )


def _first_rows(trees: list[Tree]) -> list[int]:
    """Where each tree starts among the nodes of all."""
    return list(accumulate((len(tree.nodes) for tree in trees[:-1]), initial=0)) if trees else []


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Every step of every trajectory, sorted by trajectory, then depth; int64 [P] each."""

    node_A: Tensor
    leaf: Tensor
    depth: Tensor


def _pairs(parent_A: Tensor, leaf_node_L: Tensor) -> _Pairs:
    """Climb from all leaves at once, one level at a time."""
    node, leaf = leaf_node_L, torch.arange(len(leaf_node_L))
    levels = [(node, leaf)]
    while len(node):
        above = parent_A[node]
        node, leaf = above[above >= 0], leaf[above >= 0]
        levels.append((node, leaf))
    node, leaf = (torch.cat(parts) for parts in zip(*reversed(levels), strict=True))
    order = leaf.argsort(stable=True)
    node, leaf = node[order], leaf[order]
    lengths_L = leaf.bincount(minlength=len(leaf_node_L))
    first_L = lengths_L.cumsum(0) - lengths_L
    return _Pairs(node, leaf, torch.arange(len(leaf)) - first_L[leaf] + 1)


def _states(nodes: list[Node], parents: list[int], prompts: list[int]) -> Tensor:
    """`Forest.state_N`: of nodes that follow `parents`, rows of `nodes`, -1 where they follow the prompt."""
    ids: dict[tuple[int, ...], int] = {}
    id_of: dict[int, int] = {}
    states = []
    for parent, prompt in zip(parents, prompts, strict=True):
        fork = parent if parent >= 0 else -1 - prompt
        if fork not in id_of:
            said = nodes[parent].observation_ids if parent >= 0 else []
            # Without an observation the state is the fork itself; no token has a negative id.
            id_of[fork] = ids.setdefault((prompt, *said) if said else (-1, fork), len(ids))
        states.append(id_of[fork])
    return _ids(states)


def _signals(per_tree: list[Signals], items: list[tuple[int, int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and failures of every signal at `items`, (tree, row) pairs. A row that nobody was asked about is NaN."""
    values: dict[str, Tensor] = {}
    failed: dict[str, Tensor] = {}
    for name in sorted({name for signals in per_tree for name in signals}):
        tables = [signals.get(name, {}) for signals in per_tree]
        scores = [tables[tree].get(row, _UNASKED) for tree, row in items]
        values[name] = torch.tensor(
            [score.value if score.status is ScoreStatus.scored else math.nan for score in scores], dtype=torch.float64
        )
        failed[name] = torch.tensor([score.status in BROKEN for score in scores], dtype=torch.bool)
    return values, failed


def _renumbered(group_X: Tensor) -> Tensor:
    """The same groups with ids from 0 without gaps."""
    return group_X.unique(return_inverse=True)[1]


def _ids(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
