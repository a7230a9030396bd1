"""The trained part of a batch of scored trees, as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards.types import Score, ScoredTree, ScoreStatus
from rollout.tree import ROOT, Tree

Signals = dict[str, dict[int, Score]]
"""signal -> row of a tree -> score."""

_BROKEN = frozenset({ScoreStatus.failed, ScoreStatus.timed_out})


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


@dataclass(slots=True)
class _Rows:
    """What is collected of the trees before it becomes tensors; one entry per node, leaf or pair."""

    parent: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    state: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    num_actions: list[int] = field(default_factory=list)
    leaf_node: list[int] = field(default_factory=list)
    pair_node: list[int] = field(default_factory=list)
    pair_leaf: list[int] = field(default_factory=list)


def forest_of(scored: list[ScoredTree]) -> Forest:
    """Lay the trained paths of a batch of scored trees out as tensors.

    A tree is one prompt's group, even where two trees of a batch ask the same question. Steps that were pruned, and
    trajectories that the world broke, are absent; a tree with no trained trajectory contributes nothing.
    """
    rows = _Rows()
    branch_ids: dict[tuple[int, int], int] = {}
    state_ids: dict[tuple[int, ...], int] = {}
    for prompt, tree in enumerate(scored):
        _add_tree(rows, prompt, tree, branch_ids, state_ids)
    pair_node_P, pair_leaf_P = _ids(rows.pair_node), _ids(rows.pair_leaf)
    leaf_node_L, prompt_N, branch_N, depth_N = (_ids(x) for x in (rows.leaf_node, rows.prompt, rows.branch, rows.depth))
    nodes = list(zip(rows.prompt, rows.row, strict=True))
    leaves = [nodes[node] for node in rows.leaf_node]
    step_signals, step_failed = _signals([tree.step_signals for tree in scored], nodes)
    leaf_signals, _ = _signals([tree.leaf_signals for tree in scored], leaves)
    prompts = [(prompt, ROOT) for prompt in range(len(scored))]
    prompt_signals, _ = _signals([tree.step_signals for tree in scored], prompts)
    return Forest(
        parent_N=_ids(rows.parent),
        prompt_N=prompt_N,
        row_N=_ids(rows.row),
        branch_N=branch_N,
        depth_N=depth_N,
        state_N=_ids(rows.state),
        num_leaves_N=pair_node_P.bincount(minlength=len(nodes)),
        num_actions_N=_ids(rows.num_actions),
        leaf_node_L=leaf_node_L,
        prompt_L=prompt_N[leaf_node_L],
        branch_L=branch_N[leaf_node_L],
        length_L=depth_N[leaf_node_L],
        pair_node_P=pair_node_P,
        pair_leaf_P=pair_leaf_P,
        step_signals=step_signals,
        step_failed=step_failed,
        leaf_signals=leaf_signals,
        prompt_signals=prompt_signals,
    )


def _add_tree(
    rows: _Rows,
    prompt: int,
    scored: ScoredTree,
    branch_ids: dict[tuple[int, int], int],
    state_ids: dict[tuple[int, ...], int],
) -> None:
    tree = scored.tree
    paths = [tree.path(leaf) for leaf in tree.trained_leaves()]
    depth_of = {row: depth for path in paths for depth, row in enumerate(path, start=1)}
    assert all(tree.nodes[row].kept for row in depth_of), "every step before a kept leaf is kept"
    place = {ROOT: -1}
    for row in sorted(depth_of):
        node = tree.nodes[row]
        place[row] = len(rows.parent)
        rows.parent.append(place[node.parent])
        rows.prompt.append(prompt)
        rows.row.append(row)
        rows.branch.append(branch_ids.setdefault((prompt, node.branch), len(branch_ids)))
        rows.state.append(state_ids.setdefault((prompt, *_state(tree, node.parent)), len(state_ids)))
        rows.depth.append(depth_of[row])
        rows.num_actions.append(len(node.action_ids))
    for path in paths:
        rows.pair_node.extend(place[row] for row in path)
        rows.pair_leaf.extend(len(rows.leaf_node) for _ in path)
        rows.leaf_node.append(place[path[-1]])


def _state(tree: Tree, parent: int) -> tuple[int, ...]:
    """What tells the state behind `parent` from others of the tree: its observation, or, without one, itself."""
    if parent == ROOT or not tree.nodes[parent].observation_ids:
        return (-1, parent)  # no token has a negative id
    return tuple(tree.nodes[parent].observation_ids)


def _signals(per_tree: list[Signals], items: list[tuple[int, int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and failures of every signal at `items`, (tree, row) pairs. A row that nobody was asked about is NaN."""
    values: dict[str, Tensor] = {}
    failed: dict[str, Tensor] = {}
    for name in sorted({name for signals in per_tree for name in signals}):
        scores = [per_tree[tree].get(name, {}).get(row) for tree, row in items]
        values[name] = _per_item(
            scores, lambda score: score.value if score.is_scored else math.nan, math.nan, torch.float64
        )
        failed[name] = _per_item(scores, lambda score: score.status in _BROKEN, False, torch.bool)
    return values, failed


def _per_item(scores: list[Score | None], read: Callable[[Score], float], missing: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([missing if score is None else read(score) for score in scores], dtype=dtype)


def _ids(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
