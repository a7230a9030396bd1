"""Backups: what the trajectories through a step say of that step."""

from __future__ import annotations

import torch
from torch import Tensor

from rl.credit.shapes import check_shapes, require_scored


def leaf_mean(
    value_L: Tensor,
    valid_L: Tensor,
    length_L: Tensor,
    depth_N: Tensor,
    pair_node_P: Tensor,
    pair_leaf_P: Tensor,
    *,
    gamma: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean, over the trajectories through a step, of their decayed values.

    V_n = mean{ gamma^(T_k - t_n) * value_k : k a valid trajectory through n }

    Args:
        value_L: float [L], value of each trajectory; anything where not valid.
        valid_L: bool [L], trajectories that count.
        length_L: int64 [L], steps of each trajectory (T_k).
        depth_N: int64 [N], depth of each step (t_n), 1 for a first step.
        pair_node_P, pair_leaf_P: int64 [P], a step and a trajectory through it.
        gamma: decay per step between a step and the end of its trajectory; 1 for none.
    Returns: float [N] in units of value_L, 0 where not valid; bool [N], False where no valid trajectory passes.
    Raises: ShapeError; UnscoredNode when a valid value is not finite.
    """
    node_V, value_V = _decayed(value_L, valid_L, length_L, depth_N, pair_node_P, pair_leaf_P, gamma)
    count_N = node_V.bincount(minlength=len(depth_N))
    total_N = value_L.new_zeros(len(depth_N)).index_add(0, node_V, value_V)
    return total_N / count_N.clamp(min=1), count_N > 0


def leaf_max(
    value_L: Tensor,
    valid_L: Tensor,
    length_L: Tensor,
    depth_N: Tensor,
    pair_node_P: Tensor,
    pair_leaf_P: Tensor,
    *,
    gamma: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Best, over the trajectories through a step, of their decayed values: can this step still end well?

    V_n = max{ gamma^(T_k - t_n) * value_k : k a valid trajectory through n }

    Arguments, returns and errors as `leaf_mean`.
    """
    node_V, value_V = _decayed(value_L, valid_L, length_L, depth_N, pair_node_P, pair_leaf_P, gamma)
    count_N = node_V.bincount(minlength=len(depth_N))
    best_N = value_L.new_zeros(len(depth_N)).scatter_reduce(0, node_V, value_V, "amax", include_self=False)
    return best_N, count_N > 0


def _decayed(
    value_L: Tensor,
    valid_L: Tensor,
    length_L: Tensor,
    depth_N: Tensor,
    pair_node_P: Tensor,
    pair_leaf_P: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Node and decayed value of each pair whose trajectory is valid; NaN of the others never enters a sum."""
    check_shapes(value_L=value_L, valid_L=valid_L, length_L=length_L)
    check_shapes(pair_node_P=pair_node_P, pair_leaf_P=pair_leaf_P)
    check_shapes(depth_N=depth_N)
    require_scored(value_L, valid_L, what="the value of a trajectory")
    counts_P = valid_L[pair_leaf_P]
    node_V, leaf_V = pair_node_P[counts_P], pair_leaf_P[counts_P]
    steps_left_V = (length_L[leaf_V] - depth_N[node_V]).to(value_L.dtype)
    return node_V, value_L[leaf_V] * torch.pow(gamma, steps_left_V)
