"""Returns: what a trajectory still earns from a step on. Pairs are sorted by trajectory, then depth, as in a forest."""

from __future__ import annotations

import torch
from torch import Tensor

from rl.credit.shapes import check_shapes


def to_go(reward_P: Tensor, pair_leaf_P: Tensor, *, gamma: float) -> Tensor:
    """Decayed sum of a step's and all later rewards of its trajectory.

    G_(n,k) = sum over steps s of k from n on of gamma^(s - t_n) * r_(s,k)

    Args:
        reward_P: float [P], what the step earns in the trajectory.
        pair_leaf_P: int64 [P], the trajectory; equal ids are neighbours, from the first step to the last.
        gamma: decay per step.
    Returns: float [P], in units of reward_P.
    Raises: ShapeError.
    """
    check_shapes(reward_P=reward_P, pair_leaf_P=pair_leaf_P)
    total_P, reach = reward_P, 1
    while (same_P := following(pair_leaf_P, reach)).any():  # each round sums over twice as many steps
        total_P = total_P + gamma**reach * torch.where(same_P, total_P.roll(-reach), 0)
        reach *= 2
    return total_P


def product_after(factor_P: Tensor, pair_leaf_P: Tensor) -> Tensor:
    """Product of the factors of all later steps of the trajectory, without the step's own; 1 at the last.

    Args: as `to_go`; `factor_P` in place of the rewards.
    """
    check_shapes(factor_P=factor_P, pair_leaf_P=pair_leaf_P)
    total_P, reach = torch.where(following(pair_leaf_P, 1), factor_P.roll(-1), 1), 1
    while (same_P := following(pair_leaf_P, reach)).any():
        total_P = total_P * torch.where(same_P, total_P.roll(-reach), 1)
        reach *= 2
    return total_P


def somewhere_after(is_P: Tensor, pair_leaf_P: Tensor) -> Tensor:
    """Bool [P], true of this or a later step of the trajectory."""
    return to_go(is_P.to(torch.float64), pair_leaf_P, gamma=1.0) > 0


def following(pair_leaf_P: Tensor, distance: int) -> Tensor:
    """Bool [P], whether the trajectory goes on for `distance` more steps."""
    same_P = torch.zeros(len(pair_leaf_P), dtype=torch.bool)
    same_P[:-distance] = pair_leaf_P[distance:] == pair_leaf_P[:-distance]
    return same_P
