"""What a term can read off a signal of steps besides its score. Pairs are sorted by trajectory, then depth.

NaN stands for what was not scored, and comes out wherever an answer would need it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl.credit.returns import following, to_go
from rl.credit.shapes import check_shapes

LOOKAHEAD_STEPS = 4
LOOKAHEAD_DECAY = 0.7
LOOKAHEAD_TOLERANCE = 1e-5
"""A smaller change counts as none. All three as in VSRM's code."""
SOFT_MIN_TEMPERATURE = 0.1
"""As in PURE's code."""
MAX_RETURN_EPS = 1e-6


def best_of(chance: Tensor, tries: int) -> Tensor:
    """Chance that one of several tries succeeds: 1 - (1 - x)^tries.

    The value of a Best-of-K policy from that of the policy itself; the prover of PAV (arXiv 2410.08146), section 3.
    """
    return chance if tries == 1 else 1 - (1 - chance) ** tries


def before(score_N: Tensor, parent_N: Tensor, prompt_N: Tensor, prompt_score_G: Tensor) -> Tensor:
    """The score before each step: its parent's, or at a first step the prompt's own.

    Our reading: where the prompt has none, it is the mean of its first steps', which is what they say of it.

    Args:
        score_N: float [N], of the state behind each step; NaN where not scored.
        parent_N, prompt_N: int64 [N].
        prompt_score_G: float [G], of the prompts; NaN where not scored.
    Returns: float [N], NaN where not known.
    """
    check_shapes(score_N=score_N, parent_N=parent_N, prompt_N=prompt_N)
    counts_N = (parent_N < 0) & ~score_N.isnan()
    sum_G = torch.zeros_like(prompt_score_G).index_add(0, prompt_N[counts_N], score_N[counts_N])
    mean_G = sum_G / prompt_N[counts_N].bincount(minlength=len(prompt_score_G))  # 0 / 0 is NaN, as it should be
    root_G = torch.where(prompt_score_G.isnan(), mean_G, prompt_score_G)
    return torch.where(parent_N >= 0, score_N[parent_N], root_G[prompt_N])


def lookahead(change_P: Tensor, pair_leaf_P: Tensor) -> Tensor:
    """Change of the score; where there is none, the decayed first change that follows soon.

    r_j = d_j, or where |d_j| < 1e-5: 0.7^m * d_(j+m), m the first of 1 to 4 with a change, 0 if none   VSRM
    (arXiv 2508.10293), as its code has it

    Args:
        change_P: float [P], the score behind the step less that before it; NaN where not known.
        pair_leaf_P: int64 [P], the trajectory.
    """
    check_shapes(change_P=change_P, pair_leaf_P=pair_leaf_P)
    changes_P = ~(change_P.abs() < LOOKAHEAD_TOLERANCE)  # also where it is not known: then neither is the answer
    found_P, reward_P = changes_P, torch.where(changes_P, change_P, 0)
    for distance in range(1, LOOKAHEAD_STEPS + 1):
        hit_P = ~found_P & following(pair_leaf_P, distance) & changes_P.roll(-distance)
        reward_P = torch.where(hit_P, LOOKAHEAD_DECAY**distance * change_P.roll(-distance), reward_P)
        found_P = found_P | hit_P
    return reward_P


def soft_min(score_P: Tensor, pair_leaf_P: Tensor, num_leaves: int) -> Tensor:
    """A trajectory's scores, so weighted that their sum is about the lowest of them.

    r*_i = exp(-r_i / T) / sum_j exp(-r_j / T) * r_i, T = 0.1, j over the trajectory's steps     PURE (arXiv 2504.15275)

    Args:
        score_P: float [P]; a score that is NaN is in no sum and stays NaN.
        pair_leaf_P: int64 [P], the trajectory.
        num_leaves: L.
    """
    check_shapes(score_P=score_P, pair_leaf_P=pair_leaf_P)
    known_P = ~score_P.isnan()
    lowest_L = score_P.new_zeros(num_leaves).scatter_reduce(
        0, pair_leaf_P[known_P], score_P[known_P], "amin", include_self=False
    )
    # Measured from the lowest, no exponent is above 0.
    size_P = torch.where(known_P, ((lowest_L[pair_leaf_P] - score_P) / SOFT_MIN_TEMPERATURE).exp(), 0)
    total_L = score_P.new_zeros(num_leaves).index_add(0, pair_leaf_P, size_P)
    return torch.where(known_P, size_P / torch.where(total_L > 0, total_L, 1)[pair_leaf_P] * score_P, torch.nan)


def largest_return(score_P: Tensor, pair_leaf_P: Tensor, *, gamma: float) -> Tensor:
    """Largest size of a sum of scores that is still to come, plus 1e-6: PRIME's batch_norm divides by it. A scalar.

    The released code takes it on each rank apart; this is of the whole batch. Arguments as `lookahead`; NaN counts 0.
    """
    check_shapes(score_P=score_P, pair_leaf_P=pair_leaf_P)
    to_go_P = to_go(torch.where(score_P.isnan(), 0, score_P), pair_leaf_P, gamma=gamma)
    return (to_go_P.abs().max() if len(to_go_P) else to_go_P.sum()) + MAX_RETURN_EPS
