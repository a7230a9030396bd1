"""How well a process reward model knows what trajectories come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

NUM_BINS = 10


def prm_metrics(said: Sequence[tuple[int, float, float]], *, is_logit: bool) -> dict[str, float]:
    """Order, sign and calibration of a model's scores of trajectories, before it learnt from them.

    Args:
        said: of each trajectory its group, the sum of its steps' scores, and its outcome.
        is_logit: whether the sigmoid of the sum is the chance of success; else the sum is the outcome itself.
    Returns: metrics by name; what has no number is left out.
    """
    found = {"prm/order_accuracy": order_accuracy(said), "prm/error": _mean_error(said, is_logit)}
    if is_logit:
        signs = [(score > 0) == (outcome > 0.5) for _, score, outcome in said]
        found["prm/sign_accuracy"] = sum(signs) / len(signs) if signs else math.nan
        found["prm/calibration_error"] = calibration_error(
            [(sigmoid(score), min(max(outcome, 0.0), 1.0)) for _, score, outcome in said]
        )
    return {name: value for name, value in found.items() if math.isfinite(value)}


def order_accuracy(said: Sequence[tuple[int, float, float]]) -> float:
    """Share of pairs of one group that the scores put in the order of their outcomes, as in PRIME's recipe: a pair is
    weighted by the difference of its outcomes, equal scores count half; NaN where no two outcomes of a group differ."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for group, score, outcome in said:
        groups.setdefault(group, []).append((score, outcome))
    right = whole = 0.0
    for members in groups.values():
        for (score, outcome), (other_score, other_outcome) in combinations(members, 2):
            weight = abs(outcome - other_outcome)
            agreement = (score - other_score) * (outcome - other_outcome)
            right += weight * (0.5 if score == other_score else float(agreement > 0))
            whole += weight
    return right / whole if whole else math.nan


def calibration_error(said: Sequence[tuple[float, float]]) -> float:
    """Expected calibration error: mean over bins of |mean chance - mean outcome|, each weighted by its size.

    Args:
        said: pairs of a chance in [0, 1] and an outcome in [0, 1]; NUM_BINS bins of equal width.
    """
    bins: dict[int, list[tuple[float, float]]] = {}
    for chance, outcome in said:
        bins.setdefault(min(int(chance * NUM_BINS), NUM_BINS - 1), []).append((chance, outcome))
    gaps = [abs(sum(chance - outcome for chance, outcome in members)) for members in bins.values()]
    return sum(gaps) / len(said) if said else math.nan


def sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)), without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _mean_error(said: Sequence[tuple[int, float, float]], is_logit: bool) -> float:
    """Mean distance of what is expected from what came."""
    errors = [abs((sigmoid(score) if is_logit else score) - outcome) for _, score, outcome in said]
    return sum(errors) / len(errors) if errors else math.nan
