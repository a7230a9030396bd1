"""Generalised advantage estimation on a forest, with a critic's values."""

from __future__ import annotations

import torch
from torch import Tensor

from rl.credit.shapes import check_shapes, require_scored


def tree_gae(
    reward_N: Tensor, value_N: Tensor, parent_N: Tensor, num_leaves_N: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Advantage of each step or token: ordinary GAE, averaged over the trajectories through it.

    delta_n = r_n + gamma * mean_c V_c - V_n
    A_n = delta_n + gamma * lam * mean_c A_c        GAE (arXiv 1506.02438), eq. 16, on each path

    c runs over what follows n, weighted by the trajectories through it; where nothing follows, both means are 0. GAE is
    linear, so the mean over c is the mean over trajectories. Our reading: also where a limit cut a trajectory, nothing
    is expected to follow. Observation tokens are no nodes: the parent of an action token is the action token before it.

    Args:
        reward_N: float [N], earned by node n itself, in reward units; here N counts steps or action tokens.
        value_N: float [N], what the critic said of the state before n.
        parent_N: int64 [N], row of the node before on the same path, -1 for a first one; parents come before children.
        num_leaves_N: int64 [N], trajectories through n that count; 0 leaves a node out, whatever its reward and value.
        gamma: discount per node, in [0, 1].
        lam: in [0, 1]; 1 is Monte-Carlo, 0 trusts the critic alone.
    Returns: float [N] in reward units, 0 where left out. The critic's target is this plus value_N.
    Raises: ShapeError; UnscoredNode when a reward or a value that counts is not finite.
    """
    check_shapes(reward_N=reward_N, value_N=value_N, parent_N=parent_N, num_leaves_N=num_leaves_N)
    counts_N = num_leaves_N > 0
    require_scored(reward_N, counts_N, what="the reward")
    require_scored(value_N, counts_N, what="the critic's value")
    num_nodes = len(parent_N)
    level_of_N = depths(parent_N)
    order_N = level_of_N.argsort(stable=True)
    place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(num_nodes))
    # From here on rows are sorted by depth, so that a level is a slice; the row behind the last is the parent of roots.
    parent_S = torch.where(parent_N >= 0, place_N[parent_N], num_nodes)[order_N]
    reward_S, value_S = (torch.where(counts_N, each_N, 0)[order_N] for each_N in (reward_N, value_N))
    leaves_S = num_leaves_N[order_N].to(value_S.dtype)
    below_S = _sum_at(parent_S, leaves_S)
    share_S = leaves_S / below_S.clamp(min=1)[parent_S]
    delta_S = reward_S + gamma * _sum_at(parent_S, share_S * value_S)[:num_nodes] - value_S
    advantage_S, after_S = torch.empty_like(delta_S), delta_S.new_zeros(num_nodes + 1)
    stop = num_nodes
    for size in reversed(level_of_N.bincount().tolist()):
        level = slice(stop - size, stop)
        advantage_S[level] = delta_S[level] + gamma * lam * after_S[level]
        after_S.index_add_(0, parent_S[level], share_S[level] * advantage_S[level])
        stop -= size
    return torch.where(counts_N, advantage_S[place_N], 0)


def depths(parent_N: Tensor) -> Tensor:
    """Nodes before each node on its path, from the parents' rows; parents come before children.

    Args:
        parent_N: int64 [N], -1 for a first node.
    Returns: int64 [N], 0 for a first node.
    """
    assert (parent_N < torch.arange(len(parent_N))).all(), "parents come before their children"
    depth_N, above_N = (parent_N >= 0).long(), parent_N
    while (above_N >= 0).any():  # each round looks twice as far up
        has_above_N = above_N >= 0
        depth_N = depth_N + torch.where(has_above_N, depth_N[above_N], 0)
        above_N = torch.where(has_above_N, above_N[above_N], -1)
    return depth_N


def _sum_at(parent_S: Tensor, value_S: Tensor) -> Tensor:
    """Sum of the children's values at each parent, [N + 1]; the last is that of the roots."""
    return value_S.new_zeros(len(value_S) + 1).index_add(0, parent_S, value_S)
