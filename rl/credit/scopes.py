"""Comparison: who a value is compared with, and how."""

from __future__ import annotations

import torch
from torch import Tensor

from conf.errors import ConfigError
from conf.schema import Level, Normalizer, Scope, Singleton, TermConfig
from rl.credit.forest import Forest
from rl.credit.shapes import check_shapes, require_scored

_ROUNDING_STEPS = 64
"""Gaps below so many units in the last place of the group's largest value are rounding of the mean."""
_WHITEN_EPS = 1e-8
"""Added to the variance, as the trainers that descend from verl do."""


def group_ids(forest: Forest, level: Level, scope: Scope) -> Tensor:
    """The group each step or trajectory is compared within.

    Returns: int64 [N] for Level.step, [L] for Level.trajectory; equal ids are one group, ids may have gaps.
    Raises: ConfigError for siblings of trajectories: only steps continue a step.
    """
    match level, scope:
        case Level.step, Scope.prompt:
            return forest.prompt_N
        case Level.step, Scope.tree:
            return forest.branch_N
        case Level.step, Scope.siblings:
            return sibling_groups(forest.parent_N, forest.prompt_N)
        case Level.step, Scope.batch:
            return torch.zeros_like(forest.prompt_N)
        case Level.trajectory, Scope.prompt:
            return forest.prompt_L
        case Level.trajectory, Scope.tree:
            return forest.branch_L
        case Level.trajectory, Scope.batch:
            return torch.zeros_like(forest.prompt_L)
        case _:
            raise ConfigError(
                f"a credit term has level={level.value} and scope={scope.value}: siblings are steps that continue the "
                f"same step, so whole trajectories have none. Use level=step, or scope=prompt, tree or batch."
            )


def sibling_groups(parent_N: Tensor, prompt_N: Tensor) -> Tensor:
    """One id per fork: steps with the same parent; first steps are siblings within their prompt.

    Args:
        parent_N: int64 [N], row of the parent, -1 for a first step.
        prompt_N: int64 [N], prompt of the step.
    Returns: int64 [N], from 0 without gaps.
    """
    check_shapes(parent_N=parent_N, prompt_N=prompt_N)
    # A first step has no parent row to tell prompts apart by, so it takes a negative id of its prompt's own.
    fork_N = torch.where(parent_N >= 0, parent_N, -1 - prompt_N)
    return fork_N.unique(return_inverse=True)[1]


def centered(value_N: Tensor, valid_N: Tensor, group_N: Tensor) -> Tensor:
    """How much better each value is than the mean of its group.

    A_n = x_n - mean{ x_m : m valid, in n's group }

    Args:
        value_N: float [N]; here N counts whatever is compared, steps or trajectories. Anything where not valid.
        valid_N: bool [N], values that enter the mean.
        group_N: int64 [N], group of each value, from 0.
    Returns: float [N] in units of value_N; 0 where not valid, and exactly 0 where a group's values are all equal.
    Raises: ShapeError; UnscoredNode when a valid value is not finite.
    """
    check_shapes(value_N=value_N, valid_N=valid_N, group_N=group_N)
    require_scored(value_N, valid_N)
    x_N = torch.where(valid_N, value_N, 0)  # the masked value may be NaN, and NaN * 0 is NaN
    mean_F = _group_sum(x_N, group_N) / _group_count(valid_N, group_N).clamp(min=1)
    gap_N = torch.where(valid_N, x_N - mean_F[group_N], 0)
    largest_F = torch.zeros_like(mean_F).scatter_reduce(0, group_N, x_N.abs(), "amax")
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1: divided by a tiny deviation, what is left would look like an advantage.
    rounding_F = _rounding(largest_F)
    return torch.where(gap_N.abs() > rounding_F[group_N], gap_N, 0)


def zscore(
    value_N: Tensor, valid_N: Tensor, group_N: Tensor, *, ddof: int = 1, eps: float = 1e-6, min_std: float = 0.0
) -> Tensor:
    """How many deviations each value is above the mean of its group.

    A_n = (x_n - mean) / (max(std, min_std) + eps), std = sqrt(sum (x - mean)^2 / (count - ddof))

    Two siblings with ddof 1 always get +-0.7071 however close they are; `min_std` is there for that.

    Args:
        value_N, valid_N, group_N: as `centered`.
        ddof: 1 for the unbiased deviation, 0 for the population's.
        eps: added to the deviation, in units of value_N.
        min_std: floor of the deviation, in units of value_N.
    Returns: float [N], without unit; 0 where not valid and where a group's values are all equal.
    Raises: ShapeError; UnscoredNode when a valid value is not finite.
    """
    gap_N = centered(value_N, valid_N, group_N)
    freedom_F = (_group_count(valid_N, group_N) - ddof).clamp(min=1)
    std_F = (_group_sum(gap_N.square(), group_N) / freedom_F).sqrt()
    scale_F = std_F.clamp(min=min_std) + eps
    # Where the scale is 0 so is every gap of the group; dividing by 1 keeps it 0 rather than 0 / 0.
    return gap_N / torch.where(scale_F > 0, scale_F, 1)[group_N]


def left_one_out(value_N: Tensor, valid_N: Tensor, group_N: Tensor) -> Tensor:
    """How much better each value is than the mean of the others of its group; RLOO (arXiv 2402.14740).

    A_n = x_n - mean{ x_m : m valid, in n's group, m != n } = count / (count - 1) * (x_n - mean)

    Args, returns and errors as `centered`; a value alone in its group gets 0.
    """
    gap_N = centered(value_N, valid_N, group_N)
    count_F = _group_count(valid_N, group_N)
    return gap_N * (count_F / (count_F - 1).clamp(min=1))[group_N]


def normalized(value_N: Tensor, valid_N: Tensor, group_N: Tensor, term: TermConfig) -> Tensor:
    """Compare each value with its group the way a term says.

    A value alone in its group becomes 0, or stays as it is under Singleton.raw, as in the trainers that descend from
    verl. Normalizer.none compares nothing, so there it always stays as it is.

    Args: as `centered`; `term` is read for normalizer, ddof, eps, min_std and singleton.
    Returns: float [N]; 0 where not valid; never NaN or infinite.
    """
    match term.normalizer:
        case Normalizer.none:
            check_shapes(value_N=value_N, valid_N=valid_N, group_N=group_N)
            require_scored(value_N, valid_N)
            return torch.where(valid_N, value_N, 0)
        case Normalizer.center:
            advantage_N = centered(value_N, valid_N, group_N)
        case Normalizer.zscore:
            advantage_N = zscore(value_N, valid_N, group_N, ddof=term.ddof, eps=term.eps, min_std=term.min_std)
        case Normalizer.leave_one_out:
            advantage_N = left_one_out(value_N, valid_N, group_N)
    alone_N = valid_N & (_group_count(valid_N, group_N)[group_N] == 1)
    lone_value_N = value_N if term.singleton is Singleton.raw else torch.zeros_like(value_N)
    return torch.where(alone_N, lone_value_N, advantage_N)


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
    if not len(x_N) or freedom <= 0 or gap_N.abs().max() <= _rounding(x_N.abs().max()):
        return x_N.new_zeros(())
    return ((weight_N * gap_N.square()).sum() / freedom + _WHITEN_EPS).rsqrt()


def _rounding(largest: Tensor) -> Tensor:
    """Gaps that may be nothing but the rounding of a mean of values up to `largest`."""
    return largest * torch.finfo(largest.dtype).eps * _ROUNDING_STEPS


def _num_groups(group_N: Tensor) -> int:
    return int(group_N.max()) + 1 if len(group_N) else 0


def _group_sum(value_N: Tensor, group_N: Tensor) -> Tensor:
    return value_N.new_zeros(_num_groups(group_N)).index_add(0, group_N, value_N)


def _group_count(valid_N: Tensor, group_N: Tensor) -> Tensor:
    return group_N[valid_N].bincount(minlength=_num_groups(group_N))
