"""How the tokens' losses of a mini-batch become one number.

Every loss is (sum over trained tokens of weight * loss) / denominator. What a mode does within a trajectory is folded
into the weights, and what it does between trajectories into the denominator, which adds up over trees: so packs,
micro-batches and ranks never change the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import Aggregation
from rl.credit.shapes import check_shapes


@dataclass(frozen=True, slots=True)
class Aggregated:
    """What a mode of aggregation comes to; P pairs of a step and a trajectory through it, G trees."""

    factor_P: Tensor
    """float64 [P], to multiply the pair's weight with, before any sums over trajectories are taken."""
    denominator_G: Tensor
    """float64 [G], each tree's part of what the sum of losses is divided by."""


def aggregate(
    aggregation: Aggregation,
    weight_P: Tensor,
    tokens_P: Tensor,
    pair_leaf_P: Tensor,
    tree_L: Tensor,
    *,
    num_trees: int,
    horizon_tokens: int,
) -> Aggregated:
    """Factors and denominators of a mode, with k trajectories, t tokens of each, weights w and losses l:

        token_mean                sum_k sum_t w l / sum_k sum_t w             DAPO, arXiv 2503.14476, eq. 8
        seq_mean_token_mean       sum_k (sum_t w l / sum_t w) / K             GRPO, arXiv 2402.03300, eq. 3
        seq_mean_token_sum        sum_k sum_t w l / K
        seq_mean_token_sum_norm   sum_k sum_t w l / (K * horizon)             Dr.GRPO, arXiv 2503.20783

    K is the number of trajectories with any weight. Where a shared step counts less than once for each trajectory
    (TokenWeight.sqrt_leaf, unique), the mean over a trajectory's tokens is a weighted one, and a trajectory still
    counts as 1 (our reading; the papers know no shared steps). For seq_mean_token_sum_norm old versions of verl divide
    by the horizon alone; we follow the paper, TRL and newer verl, which divide by the number of trajectories too.

    Args:
        weight_P: float [P], of `rl.credit.assign`; 0 where a pair trains nothing.
        tokens_P: int64 [P], action tokens of the pair's step.
        pair_leaf_P: int64 [P], the pair's trajectory, an index into L.
        tree_L: int64 [L], the trajectory's tree, from 0 to num_trees - 1.
        horizon_tokens: seq_mean_token_sum_norm: the constant; above 0 there.
    Raises: ShapeError when the arguments disagree on a size.
    """
    check_shapes(weight_P=weight_P, tokens_P=tokens_P, pair_leaf_P=pair_leaf_P, tree_L=tree_L)
    weight_L = torch.zeros(len(tree_L), dtype=torch.float64)
    weight_L.index_add_(0, pair_leaf_P, weight_P.double() * tokens_P)
    trained_L = (weight_L > 0).double()
    factor_P = torch.ones(len(weight_P), dtype=torch.float64)
    match aggregation:
        case Aggregation.token_mean:
            denominator_L = weight_L
        case Aggregation.seq_mean_token_mean:
            denominator_L = trained_L
            factor_P = 1 / torch.where(weight_L > 0, weight_L, 1)[pair_leaf_P]
        case Aggregation.seq_mean_token_sum:
            denominator_L = trained_L
        case Aggregation.seq_mean_token_sum_norm:
            assert horizon_tokens > 0, "checked with the configuration"
            denominator_L = trained_L * horizon_tokens
    denominator_G = torch.zeros(num_trees, dtype=torch.float64).index_add(0, tree_L, denominator_L)
    return Aggregated(factor_P, denominator_G)
