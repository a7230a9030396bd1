"""Normalisers: how a value is compared with its group. N counts whatever is compared: steps, trajectories or pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import Degenerate, Normalizer, TermConfig
from rl.credit.shapes import check_shapes, require_scored

_ROUNDING_STEPS = 64
"""Gaps below so many units in the last place of the group's largest value are rounding of the mean."""
_ROUNDING_FLOOR = 1e-13
"""Gaps below it, in units of the values, are rounding too: sums that should cancel out leave as much behind."""
_WHITEN_EPS = 1e-8
"""Added to the variance, as the trainers that descend from verl do."""
NO_GROUP = (Normalizer.none, Normalizer.max_return, Normalizer.running)
"""Normalisers that do not compare a value with others of its group: none of them is ever alone."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of all values that a term has seen in the run."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared gaps from the mean."""

    def including(self, value_N: Tensor, valid_N: Tensor) -> Moments:
        """These values too; Chan's update, so that large means lose no digits."""
        value_V = value_N[valid_N]
        count = self.count + len(value_V)
        if not len(value_V):
            return self
        mean = float(value_V.mean())
        gap = mean - self.mean
        squares = float((value_V - mean).square().sum()) + gap**2 * self.count * len(value_V) / count
        return Moments(count, self.mean + gap * len(value_V) / count, self.squares + squares)


NOTHING_SEEN = Moments()
"""At the start of a run."""


def normalized(
    value_N: Tensor,
    valid_N: Tensor,
    group_N: Tensor,
    term: TermConfig,
    *,
    weight_N: Tensor | None = None,
    history: Moments = NOTHING_SEEN,
) -> tuple[Tensor, Tensor]:
    """Compare each value with its group the way a term says.

    A value alone in its group, and values that are all equal, become 0, stay as they are (Degenerate.raw, as in
    trainers that descend from verl for the former), or are not spoken for (Degenerate.drop). Normalisers that compare
    with no group leave nothing alone.

    Args:
        value_N: float [N]; anything where not valid.
        valid_N: bool [N], values that count.
        group_N: int64 [N], group of each value, from 0.
        term: read for normalizer, ddof, eps, min_std, singleton and zero_variance.
        weight_N: float [N], how often each value counts in mean and deviation; once each where None.
        history: of earlier values, for Normalizer.running.
    Returns: float [N], 0 where not valid, never NaN or infinite; bool [N], values that are spoken for.
    Raises: ShapeError; UnscoredNode when a valid value is not finite.
    """
    check_shapes(value_N=value_N, valid_N=valid_N, group_N=group_N)
    require_scored(value_N, valid_N)
    match term.normalizer:
        case Normalizer.none:
            advantage_N = torch.where(valid_N, value_N, 0)
        case Normalizer.center:
            advantage_N = centered(value_N, valid_N, group_N, weight_N)
        case Normalizer.zscore:
            advantage_N = zscore(
                value_N, valid_N, group_N, weight_N, ddof=term.ddof, eps=term.eps, min_std=term.min_std
            )
        case Normalizer.leave_one_out:
            advantage_N = left_one_out(value_N, valid_N, group_N)
        case Normalizer.rank:
            place_N = ranked(value_N, valid_N, group_N)
            advantage_N = zscore(place_N, valid_N, group_N, ddof=term.ddof, eps=term.eps, min_std=term.min_std)
        case Normalizer.whiten:
            variance_F = _variance(centered(value_N, valid_N, group_N, weight_N), valid_N, group_N, weight_N, term.ddof)
            deviation_F = (variance_F.clamp(min=term.min_std**2) + _WHITEN_EPS).sqrt()
            advantage_N = centered(value_N, valid_N, group_N, weight_N) / deviation_F[group_N]
        case Normalizer.center_batch_std:
            one_N = torch.zeros_like(group_N)
            gap_N = centered(value_N, valid_N, one_N, weight_N)
            std = _variance(gap_N, valid_N, one_N, weight_N, term.ddof).sqrt().clamp(min=term.min_std)
            advantage_N = _over(centered(value_N, valid_N, group_N, weight_N), (std + term.eps)[one_N])
        case Normalizer.max_return:
            size_N = torch.where(valid_N, value_N.abs(), 0)
            largest_F = size_N.new_zeros(_num_groups(group_N)).scatter_reduce(0, group_N, size_N, "amax")
            advantage_N = _over(torch.where(valid_N, value_N, 0), (largest_F + term.eps)[group_N])
        case Normalizer.running:
            seen = history.including(value_N, valid_N)
            std = max((seen.squares / max(seen.count - term.ddof, 1)) ** 0.5, term.min_std)
            gap_N = torch.where(valid_N, value_N - seen.mean, 0)
            advantage_N = _over(gap_N, torch.full_like(gap_N, std + term.eps))
        case Normalizer.token_leave_one_out | Normalizer.token_leave_one_out_released:
            raise AssertionError("compares trajectories token by token: `less_token_mean`")
    if term.normalizer in NO_GROUP:
        return advantage_N, valid_N
    count_N = _group_count(valid_N, group_N)[group_N]
    if term.zero_variance is not Degenerate.zero:  # they are 0 already
        equal_N = valid_N & (count_N > 1) & (_spread(value_N, valid_N, group_N)[group_N] == 0)
        advantage_N, valid_N = with_policy(advantage_N, valid_N, value_N, equal_N, term.zero_variance)
    return with_policy(advantage_N, valid_N, value_N, valid_N & (count_N == 1), term.singleton)


def with_policy(
    advantage_N: Tensor, valid_N: Tensor, value_N: Tensor, which_N: Tensor, policy: Degenerate
) -> tuple[Tensor, Tensor]:
    """What becomes of the values of which nothing can be said, `which_N`; returns as `normalized`."""
    if policy is Degenerate.drop:
        valid_N = valid_N & ~which_N
    lone_value_N = value_N if policy is Degenerate.raw else torch.zeros_like(value_N)
    return torch.where(which_N, lone_value_N, advantage_N), valid_N


def centered(value_N: Tensor, valid_N: Tensor, group_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """How much better each value is than the mean of its group.

    A_n = x_n - sum(w_m * x_m) / sum(w_m), m valid, in n's group

    Args:
        value_N: float [N]; anything where not valid.
        valid_N: bool [N], values that enter the mean.
        group_N: int64 [N], group of each value, from 0.
        weight_N: float [N], above 0; 1 each where None.
    Returns: float [N] in units of value_N; 0 where not valid, and exactly 0 where a group's values are all equal.
    Raises: ShapeError; UnscoredNode when a valid value is not finite.
    """
    check_shapes(value_N=value_N, valid_N=valid_N, group_N=group_N)
    require_scored(value_N, valid_N)
    w_N = _weights(value_N, valid_N, weight_N)
    x_N = torch.where(valid_N, value_N, 0)  # the masked value may be NaN, and NaN * 0 is NaN
    total_F = _group_sum(w_N, group_N)
    mean_F = _group_sum(w_N * x_N, group_N) / torch.where(total_F > 0, total_F, 1)
    gap_N = torch.where(valid_N, x_N - mean_F[group_N], 0)
    largest_F = torch.zeros_like(mean_F).scatter_reduce(0, group_N, x_N.abs(), "amax")
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1: divided by a tiny deviation, what is left would look like an advantage.
    return torch.where(gap_N.abs() > rounding(largest_F)[group_N], gap_N, 0)


def zscore(
    value_N: Tensor,
    valid_N: Tensor,
    group_N: Tensor,
    weight_N: Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
    min_std: float = 0.0,
) -> Tensor:
    """How many deviations each value is above the mean of its group.

    A_n = (x_n - mean) / (max(std, min_std) + eps), std = sqrt(sum w (x - mean)^2 / (sum w - ddof))

    Two siblings with ddof 1 always get +-0.7071 however close they are; `min_std` is there for that.

    Args:
        value_N, valid_N, group_N, weight_N: as `centered`.
        ddof: 1 for the unbiased deviation, 0 for the population's.
        eps: added to the deviation, in units of value_N.
        min_std: floor of the deviation, in units of value_N.
    Returns: float [N], without unit; 0 where not valid and where a group's values are all equal.
    Raises: ShapeError; UnscoredNode when a valid value is not finite.
    """
    gap_N = centered(value_N, valid_N, group_N, weight_N)
    std_F = _variance(gap_N, valid_N, group_N, weight_N, ddof).sqrt()
    return _over(gap_N, (std_F.clamp(min=min_std) + eps)[group_N])


def left_one_out(value_N: Tensor, valid_N: Tensor, group_N: Tensor) -> Tensor:
    """How much better each value is than the mean of the others of its group; RLOO (arXiv 2402.14740).

    A_n = x_n - mean{ x_m : m valid, in n's group, m != n } = count / (count - 1) * (x_n - mean)

    Args, returns and errors as `centered`; a value alone in its group gets 0.
    """
    gap_N = centered(value_N, valid_N, group_N)
    count_F = _group_count(valid_N, group_N)
    return gap_N * (count_F / (count_F - 1).clamp(min=1))[group_N]


def ranked(value_N: Tensor, valid_N: Tensor, group_N: Tensor) -> Tensor:
    """Place of each value in its group, from 1 for the best to 0 for the worst.

    g_n = (worst - r_n) / (worst - 1), r_n = 1 + the number of greater values, worst the largest r     ArenaRL
    (arXiv 2601.06487), as its code has it: equal values share the better place

    Args: as `centered`.
    Returns: float [N]; 0 where not valid and where a group's values are all equal.
    """
    check_shapes(value_N=value_N, valid_N=valid_N, group_N=group_N)
    value_V, group_V = value_N[valid_N], group_N[valid_N]
    order_V = value_V.argsort(descending=True)
    order_V = order_V[group_V[order_V].argsort(stable=True)]  # by group, and best first within it
    sorted_V, groups_V, place_V = value_V[order_V], group_V[order_V], torch.arange(len(order_V))
    new_group_V = torch.ones_like(groups_V, dtype=torch.bool)
    new_group_V[1:] = groups_V[1:] != groups_V[:-1]
    new_value_V = new_group_V.clone()
    new_value_V[1:] |= sorted_V[:-1] - sorted_V[1:] > rounding(torch.maximum(sorted_V[1:].abs(), sorted_V[:-1].abs()))
    first_V = torch.where(new_group_V, place_V, 0).cummax(0).values if len(place_V) else place_V
    equal_V = torch.where(new_value_V, place_V, 0).cummax(0).values if len(place_V) else place_V
    rank_V = torch.zeros_like(value_V).scatter(0, order_V, (equal_V - first_V).to(value_V.dtype))
    worst_F = value_V.new_zeros(_num_groups(group_N)).scatter_reduce(0, group_V, rank_V, "amax")
    worst_V = worst_F[group_V]
    return torch.zeros_like(value_N).masked_scatter(valid_N, (worst_V - rank_V) / worst_V.clamp(min=1))


def less_token_mean(
    reward_P: Tensor,
    valid_P: Tensor,
    tokens_P: Tensor,
    pair_leaf_P: Tensor,
    group_L: Tensor,
    term: TermConfig,
) -> tuple[Tensor, Tensor]:
    """Rewards less what the other trajectories of the group earn per token, for as many tokens as the step has.

        paper     r_(n,k) - |n| * b_k,  b_k = 1/(K-1) * sum_(j != k) rbar_j               PRIME (arXiv 2502.01456)
        released  r_(n,k) * K/(K-1) - |n| * 1/(K-1) * sum_j rbar_j, j = k too

    rbar_j is trajectory j's mean reward per token, |n| the tokens of step n, K the trajectories of the group. The two
    agree in what a trajectory earns in all, and spread it over its steps otherwise.

    Args:
        reward_P: float [P], of a step in a trajectory.
        valid_P: bool [P]; a trajectory counts if any of its pairs does, and then by those that do.
        tokens_P: float [P], sampled tokens of the step.
        pair_leaf_P: int64 [P], the trajectory.
        group_L: int64 [L], group of each trajectory.
        term: read for normalizer and singleton.
    Returns: as `normalized`, over pairs.
    """
    check_shapes(reward_P=reward_P, valid_P=valid_P, tokens_P=tokens_P, pair_leaf_P=pair_leaf_P)
    require_scored(reward_P, valid_P, what="the reward of a pair")
    zeros_L = reward_P.new_zeros(len(group_L))
    leaf_V = pair_leaf_P[valid_P]
    tokens_L = zeros_L.index_add(0, leaf_V, tokens_P[valid_P])
    mean_L = zeros_L.index_add(0, leaf_V, reward_P[valid_P]) / tokens_L.clamp(min=1)
    counts_L = tokens_L > 0
    num_others_L = (_group_count(counts_L, group_L)[group_L] - 1).clamp(min=1)
    sum_L = _group_sum(mean_L, group_L)[group_L]
    if term.normalizer is Normalizer.token_leave_one_out_released:
        factor_L, baseline_L = 1 + 1 / num_others_L, sum_L / num_others_L
    else:
        factor_L, baseline_L = torch.ones_like(sum_L), (sum_L - mean_L) / num_others_L
    gap_P = factor_L[pair_leaf_P] * reward_P - tokens_P * baseline_L[pair_leaf_P]
    gap_P = torch.where(valid_P, gap_P, 0)
    alone_P = valid_P & (_group_count(counts_L, group_L)[group_L] == 1)[pair_leaf_P]
    return with_policy(gap_P, valid_P, reward_P, alone_P, term.singleton)


def whitened(value_N: Tensor, weight_N: Tensor) -> Tensor:
    """All values to mean 0 and deviation 1, each counted as often as its weight says.

    A_n = (x_n - mean) / sqrt(var + 1e-8), var = sum w (x - mean)^2 / (sum w - 1)

    Args:
        value_N: float [N]; here N counts whatever is compared.
        weight_N: float [N], how often each value counts; 0 leaves it out.
    Returns: float [N], without unit; 0 where left out, where all values are equal, and for a single count, of which the
        deviation is not known.
    Raises: ShapeError; UnscoredNode when a value that counts is not finite.
    """
    check_shapes(value_N=value_N, weight_N=weight_N)
    counts_N = weight_N > 0
    require_scored(value_N, counts_N)
    gap_N = torch.where(counts_N, value_N - weighted_mean(value_N, weight_N), 0)
    return gap_N * inverse_deviation(value_N, weight_N)


def weighted_mean(value_N: Tensor, weight_N: Tensor) -> Tensor:
    """Mean of the values that count, a scalar; 0 where none does. Arguments as `whitened`."""
    total = weight_N.sum()
    return (torch.where(weight_N > 0, value_N, 0) * weight_N).sum() / torch.where(total > 0, total, 1)


def inverse_deviation(value_N: Tensor, weight_N: Tensor) -> Tensor:
    """What `whitened` multiplies with, a scalar; 0 where there is no deviation to speak of. Arguments as `whitened`."""
    x_N = torch.where(weight_N > 0, value_N, 0)
    gap_N = torch.where(weight_N > 0, x_N - weighted_mean(value_N, weight_N), 0)
    freedom = weight_N.sum() - 1
    if not len(x_N) or freedom <= 0 or gap_N.abs().max() <= rounding(x_N.abs().max()):
        return x_N.new_zeros(())
    return ((weight_N * gap_N.square()).sum() / freedom + _WHITEN_EPS).rsqrt()


def rounding(largest: Tensor) -> Tensor:
    """Gaps that may be nothing but the rounding of a mean of values up to `largest`."""
    return (largest * torch.finfo(largest.dtype).eps * _ROUNDING_STEPS).clamp(min=_ROUNDING_FLOOR)


def _over(gap_N: Tensor, scale_N: Tensor) -> Tensor:
    # Where the scale is 0 so is every gap of the group; dividing by 1 keeps it 0 rather than 0 / 0.
    return gap_N / torch.where(scale_N > 0, scale_N, 1)


def _variance(gap_N: Tensor, valid_N: Tensor, group_N: Tensor, weight_N: Tensor | None, ddof: int) -> Tensor:
    """Of each group [F], from gaps to its mean."""
    w_N = _weights(gap_N, valid_N, weight_N)
    freedom_F = _group_sum(w_N, group_N) - ddof
    # A group without freedom has one value, and no gaps.
    return _group_sum(w_N * gap_N.square(), group_N) / torch.where(freedom_F > 0, freedom_F, 1)


def _spread(value_N: Tensor, valid_N: Tensor, group_N: Tensor) -> Tensor:
    """Largest gap to the mean in each group [F]; exactly 0 where all values are equal."""
    gap_N = centered(value_N, valid_N, group_N).abs()
    return gap_N.new_zeros(_num_groups(group_N)).scatter_reduce(0, group_N, gap_N, "amax")


def _weights(value_N: Tensor, valid_N: Tensor, weight_N: Tensor | None) -> Tensor:
    return valid_N.to(value_N.dtype) * (1 if weight_N is None else weight_N)


def _num_groups(group_N: Tensor) -> int:
    return int(group_N.max()) + 1 if len(group_N) else 0


def _group_sum(value_N: Tensor, group_N: Tensor) -> Tensor:
    return value_N.new_zeros(_num_groups(group_N)).index_add(0, group_N, value_N)


def _group_count(valid_N: Tensor, group_N: Tensor) -> Tensor:
    return group_N[valid_N].bincount(minlength=_num_groups(group_N))
