"""Backups: what the trajectories through a step say of that step."""

from __future__ import annotations

import torch
from torch import Tensor

from conf.schema import Backup
from rl.credit.returns import product_after
from rl.credit.shapes import check_shapes, require_scored


def decayed(value_L: Tensor, length_L: Tensor, depth_P: Tensor, pair_leaf_P: Tensor, *, gamma: float) -> Tensor:
    """What a trajectory's end is worth at each of its steps: gamma^(T_k - t_n) * value_k.

    Args:
        value_L: float [L], value of each trajectory.
        length_L: int64 [L], steps of each trajectory (T_k).
        depth_P: int64 [P], depth of the pair's step (t_n), 1 for a first step.
        pair_leaf_P: int64 [P], the pair's trajectory.
        gamma: decay per step between a step and the end; 1 for none.
    Returns: float [P], in units of value_L.
    Raises: ShapeError.
    """
    check_shapes(value_L=value_L, length_L=length_L)
    check_shapes(depth_P=depth_P, pair_leaf_P=pair_leaf_P)
    steps_left_P = (length_L[pair_leaf_P] - depth_P).to(value_L.dtype)
    return value_L[pair_leaf_P] * torch.pow(gamma, steps_left_P)


def backed_up(
    backup: Backup, value_P: Tensor, valid_P: Tensor, weight_P: Tensor, group_P: Tensor, num_groups: int
) -> tuple[Tensor, Tensor]:
    """One value for each step, or whatever pairs are grouped by, made of those it has in the trajectories through it.

        leaf_mean    mean over the trajectories
        child_mean   mean over the steps that continue it of their own means (SPO, arXiv 2505.23564; TreeRPO)
        max          the best
        any          1 if one is above 0, else 0

    The two means agree where all continuations of a step lead to equally many trajectories.

    Args:
        backup: not Backup.none.
        value_P: float [P], value of the step in the trajectory; anything where not valid.
        valid_P: bool [P], pairs that count.
        weight_P: float [P], of `continuation_weights`, for child_mean.
        group_P: int64 [P], the pair's step.
        num_groups: number of steps.
    Returns: float [N] in units of value_P, 0 where not valid; bool [N], False where no valid pair is.
    Raises: ShapeError; UnscoredNode when a valid value is not finite.
    """
    check_shapes(value_P=value_P, valid_P=valid_P, weight_P=weight_P, group_P=group_P)
    require_scored(value_P, valid_P, what="the value of a pair")
    value_V, group_V = value_P[valid_P], group_P[valid_P]
    match backup:
        case Backup.leaf_mean:
            return mean_of_groups(value_V, torch.ones_like(value_V), group_V, num_groups)
        case Backup.child_mean:
            return mean_of_groups(value_V, weight_P[valid_P], group_V, num_groups)
        case Backup.max | Backup.any:
            best_N = value_P.new_zeros(num_groups).scatter_reduce(0, group_V, value_V, "amax", include_self=False)
            if backup is Backup.any:
                best_N = (best_N > 0).to(value_P.dtype)
            return best_N, group_V.bincount(minlength=num_groups) > 0
        case Backup.none:
            raise AssertionError("a step has no one value without a backup")


def mean_of_groups(value_V: Tensor, weight_V: Tensor, group_V: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Weighted mean of the values of each group, 0 for a group without any; and bool, which have some."""
    zeros = value_V.new_zeros(num_groups)
    weight = zeros.index_add(0, group_V, weight_V.to(value_V.dtype))
    total = zeros.index_add(0, group_V, weight_V * value_V)
    return total / torch.where(weight > 0, weight, 1), weight > 0


def continuation_weights(taken_P: Tensor, pair_node_P: Tensor, pair_leaf_P: Tensor, parent_N: Tensor) -> Tensor:
    """How much a trajectory counts in the child-mean of a step: the chance of taking it from there, if every
    continuation of a step were as likely as another. A continuation that no counting trajectory takes is none.

    Args:
        taken_P: bool [P], pairs that count; where one does, so do those of its trajectory's later steps.
        pair_node_P, pair_leaf_P: int64 [P], a step and a trajectory through it, in a forest's order.
        parent_N: int64 [N], row of the parent, -1 for a first step.
    Returns: float64 [P]; those of a step's counting pairs add up to 1.
    """
    check_shapes(taken_P=taken_P, pair_node_P=pair_node_P, pair_leaf_P=pair_leaf_P)
    counts_N = torch.zeros(len(parent_N), dtype=torch.bool)
    counts_N[pair_node_P[taken_P]] = True
    num_children_N = parent_N[counts_N & (parent_N >= 0)].bincount(minlength=len(parent_N)).clamp(min=1)
    parent_P = parent_N[pair_node_P]
    chance_P = torch.where(parent_P >= 0, 1 / num_children_N[parent_P].to(torch.float64), 1)
    return product_after(chance_P, pair_leaf_P)
