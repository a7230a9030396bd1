"""Curves of runs: a metric against generated tokens or steps, and its value at a point that runs share."""

from __future__ import annotations

import itertools
from pathlib import Path

from conf.errors import ConfigError
from rl.metrics import METRICS, Better, read_metrics

TOKENS = "rollout/total_generated_tokens"
Curve = list[tuple[float, float]]
"""(tokens or steps, value), ascending."""


def curve_of(file: Path, metric: str, *, by_steps: bool = False) -> Curve:
    """A metric's values in a metrics.jsonl; empty while there are none.

    Raises: DataError when the file is damaged.
    """
    if not file.exists():
        return []
    points = []
    for row in read_metrics(file):
        place = row["step"] if by_steps else row.get(TOKENS)
        if place is not None and row.get(metric) is not None:
            points.append((float(place), float(row[metric])))
    return points


def value_at(curve: Curve, place: float) -> float | None:
    """The value at a point, on a straight line between its neighbours; None where the curve does not reach."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if before <= place <= after:
            share = (place - before) / (after - before) if after > before else 1.0
            return low + share * (high - low)
    return next((value for at, value in curve if at == place), None)


def is_better_high(metric: str) -> bool:
    """True for a metric that should rise, False for one that should fall.

    Raises: ConfigError for one that no run writes or that has no better way.
    """
    found = next((each for each in METRICS if each.matches(metric)), None)
    if found is None or found.better is Better.neutral:
        why = "is written by no run" if found is None else "is better neither high nor low"
        raise ConfigError(
            f'the metric "{metric}" {why}, so runs cannot be told apart by it. Use e.g. eval/success_share; the names '
            f"stand in each run's metrics.jsonl."
        )
    return found.better is Better.higher
