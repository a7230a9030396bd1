"""Is credit well? What a step's scores, outcomes and advantages say of each other, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from conf.schema import CreditConfig, Level, Scope, TermConfig
from rewards.types import Score, ScoredTree
from rl.credit.forest import Forest, forest_of
from rl.credit.scopes import sibling_groups
from rl.credit.shapes import check_shapes
from rl.credited import Credited
from rl.policy.prm_metrics import calibration_error
from rl.select import outcome
from rl.shares import Shares

_ROUNDING = 1e-18
"""Sums of squares below it are what rounding leaves of equal values."""


def health_metrics(
    scored: Sequence[ScoredTree], found: Credited, shares: Shares, cfg: CreditConfig
) -> dict[str, float]:
    """The health metrics of one training step, as rl/metrics.py declares them; one that has no number is left out.

    Args:
        scored: the step's trees before selection, for a choice by agreement must not flatter the agreement.
        found: what credit made of them.
        shares: of `found`.
    """
    metrics = signal_metrics(scored, forest_of(list(scored)) if any(found.selection.left_out) else found.forest)
    credit = found.credit
    metrics |= {
        "health/effective_steps": effective_number(credit.w_pos_N - credit.w_neg_N),
        "health/no_credit_share": _share((credit.w_pos_N == 0) & (credit.w_neg_N == 0)),
    }
    for name, term in cfg.terms.items():
        metrics[f"health/{name}_silent_share"] = silent_share(
            *_compared_items(found.forest, term, shares.compared[name])
        )
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def signal_metrics(scored: Sequence[ScoredTree], forest: Forest) -> dict[str, float]:
    """How signals and outcomes agree, how often a signal is missing, and what long trajectories earn; NaN if unknown.

    Args:
        scored: the trees that `forest` was made of.
    """
    outcome_L = outcomes(scored, forest)
    values = {**step_source_values(scored, forest), **forest.step_signals}
    metrics = {
        f"health/{name}_agreement_share": agreement(path_mean(forest, value_N), outcome_L, forest.prompt_L)
        for name, value_N in values.items()
    }
    for name, value_N in values.items():
        metrics[f"health/{name}_calibration_error"] = _calibration(path_mean(forest, value_N), outcome_L)
    tokens_L = path_sum(forest, forest.num_actions_N.double())
    metrics |= {
        "health/outcome_steps_correlation": within_correlation(forest.length_L.double(), outcome_L, forest.prompt_L),
        "health/outcome_tokens_correlation": within_correlation(tokens_L, outcome_L, forest.prompt_L),
    }
    for name, value in [*forest.step_signals.items(), *forest.leaf_signals.items()]:
        metrics[f"health/{name}_invalid_share"] = _share(value.isnan())
    return metrics


def outcomes(scored: Sequence[ScoredTree], forest: Forest) -> Tensor:
    """What the first trajectory source says of each trajectory, float64 [L]; NaN where it was not scored."""
    rows = forest.row_N[forest.leaf_node_L].tolist()
    said = [outcome(scored[tree], row) for tree, row in zip(forest.prompt_L.tolist(), rows, strict=True)]
    return torch.tensor([math.nan if value is None else value for value in said], dtype=torch.float64)


def step_source_values(scored: Sequence[ScoredTree], forest: Forest) -> dict[str, Tensor]:
    """source -> its score of each step, float64 [N]; NaN where it gave none. Sources of weight 0 are among them."""
    places = list(zip(forest.prompt_N.tolist(), forest.row_N.tolist(), strict=True))

    def value(score: Score | None) -> float:
        return score.value if score is not None and score.is_scored else math.nan

    names = sorted({name for tree in scored for name in tree.step_scores})
    return {
        name: torch.tensor(
            [value(scored[tree].step_scores.get(name, {}).get(row)) for tree, row in places], dtype=torch.float64
        )
        for name in names
    }


def path_mean(forest: Forest, value_N: Tensor) -> Tensor:
    """Mean over each trajectory's steps that have a value, float64 [L]; NaN where none has."""
    has_N = (~value_N.isnan()).double()
    return path_sum(forest, torch.where(has_N > 0, value_N, 0).double()) / path_sum(forest, has_N)


def agreement(value_X: Tensor, outcome_X: Tensor, group_X: Tensor) -> float:
    """Of all pairs of one group with different outcomes, the share that the value puts in the same order.

    With outcomes of 0 and 1 this is the area under the ROC curve, over the pairs of all groups together: 0.5 is chance,
    equal values count a half. Pairs are of one prompt, so that an easy prompt's good steps are no evidence.

    Args:
        value_X: float [X], e.g. the mean step score of a trajectory; NaN leaves it out.
        outcome_X: float [X]; NaN leaves it out.
        group_X: int64 [X].
    Returns: in [0, 1]; NaN when there is no such pair.
    """
    check_shapes(value_X=value_X, outcome_X=outcome_X, group_X=group_X)
    right = whole = 0.0
    known_X = ~(value_X.isnan() | outcome_X.isnan())
    for value_G, outcome_G in _groups(group_X[known_X], value_X[known_X], outcome_X[known_X]):
        above_GG = (outcome_G[:, None] - outcome_G) > 0
        order_GG = (value_G[:, None] - value_G).sign()
        right += float(((1 + order_GG) / 2)[above_GG].sum())
        whole += int(above_GG.sum())
    return right / whole if whole else math.nan


def within_correlation(first_X: Tensor, second_X: Tensor, group_X: Tensor) -> float:
    """Pearson's correlation of two values within groups: both less their group's mean, all groups together.

    Returns: in [-1, 1]; NaN where one of the two never varies within a group. Entries that are NaN are left out.
    """
    check_shapes(first_X=first_X, second_X=second_X, group_X=group_X)
    known_X = ~(first_X.isnan() | second_X.isnan())
    group_X = group_X[known_X]
    first_X, second_X = (_centred(value_X[known_X].double(), group_X) for value_X in (first_X, second_X))
    first, second = float(first_X @ first_X), float(second_X @ second_X)
    return float(first_X @ second_X) / math.sqrt(first * second) if min(first, second) > _ROUNDING else math.nan


def effective_number(weight_X: Tensor) -> float:
    """How many entries of equal weight would weigh as much: (sum w)^2 / sum w^2; NaN where all are 0.

    Kish's effective sample size. Far below the number of steps, a few of them make the whole update.
    """
    weight_X = weight_X.double()
    squares = float(weight_X.square().sum())
    return float(weight_X.sum()) ** 2 / squares if squares else math.nan


def silent_share(value_X: Tensor, group_X: Tensor) -> float:
    """Share of the groups of two or more in which every compared value is 0, so that nothing is told apart.

    Args:
        value_X: float [X], compared values; NaN is not in its group.
        group_X: int64 [X], from 0.
    Returns: in [0, 1]; NaN when no group has two.
    """
    check_shapes(value_X=value_X, group_X=group_X)
    known_X = ~value_X.isnan()
    has_two_G = group_X[known_X].bincount() > 1
    is_loud_G = group_X[known_X & (value_X != 0)].bincount(minlength=len(has_two_G)) > 0
    return _share(~is_loud_G[has_two_G])


def _compared_items(forest: Forest, term: TermConfig, compared_N: Tensor) -> tuple[Tensor, Tensor]:
    """A term's compared values, one per trajectory or step, and the group of each.

    Scopes that are finer than a prompt in another way, such as all ancestors, are taken by prompt.
    """
    if term.level is Level.trajectory:
        prompt_X, branch_X, value_X = forest.prompt_L, forest.branch_L, compared_N[forest.leaf_node_L]
    else:
        prompt_X, branch_X, value_X = forest.prompt_N, forest.branch_N, compared_N
    match term.scope:
        case Scope.siblings:
            return value_X, sibling_groups(forest.parent_N, forest.prompt_N)
        case Scope.tree:
            return value_X, branch_X
        case Scope.batch:
            return value_X, torch.zeros_like(prompt_X)
        case _:
            return value_X, prompt_X


def _calibration(chance_L: Tensor, outcome_L: Tensor) -> float:
    """Gap of trajectories' mean scores and outcomes, in bins; NaN unless both are chances, all of them in [0, 1]."""
    known_L = chance_L.isfinite() & outcome_L.isfinite()
    said = list(zip(chance_L[known_L].tolist(), outcome_L[known_L].tolist(), strict=True))
    is_chance = all(0 <= chance <= 1 and 0 <= outcome <= 1 for chance, outcome in said)
    return calibration_error(said) if said and is_chance else math.nan


def _share(is_X: Tensor) -> float:
    return int(is_X.sum()) / len(is_X) if len(is_X) else math.nan


def path_sum(forest: Forest, value_N: Tensor) -> Tensor:
    """Sum over the steps of each trajectory: float [N] -> float [L]."""
    zeros_L = value_N.new_zeros(len(forest.leaf_node_L))
    return zeros_L.index_add(0, forest.pair_leaf_P, value_N[forest.pair_node_P])


def _centred(value_X: Tensor, group_X: Tensor) -> Tensor:
    count_G = group_X.bincount()
    total_G = value_X.new_zeros(len(count_G)).index_add(0, group_X, value_X)
    return value_X - (total_G / count_G.clamp(min=1))[group_X]


def _groups(group_X: Tensor, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The values of each group."""
    order_X = group_X.argsort(stable=True)
    counts = group_X.unique(return_counts=True)[1].tolist()
    return zip(*(value_X[order_X].split(counts) for value_X in values), strict=True)
