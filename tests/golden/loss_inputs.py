"""Random sequences that every recording script and the tests share, as plain numbers that JSON keeps exactly."""

from __future__ import annotations

import random

MASK = [[1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 0]]
"""Trained tokens; holes are what tools replied."""


def loss_inputs(seed: int = 0) -> dict[str, list[list[float]]]:
    """Rows of numbers, far enough apart that every clip, low, high and dual, meets tokens on both of its sides."""
    rng = random.Random(seed)

    def rows(mean: float, spread: float) -> list[list[float]]:
        return [[round(rng.gauss(mean, spread), 3) for _ in row] for row in MASK]

    old = rows(-2.0, 0.5)

    def near(spread: float) -> list[list[float]]:
        return [[round(value + rng.gauss(0.0, spread), 3) for value in row] for row in old]

    logprob = near(0.5)
    logprob[0][1], logprob[2][1] = round(old[0][1] + 1.5, 3), round(old[2][1] + 1.5, 3)
    advantage = rows(0.0, 1.0)
    advantage[0][1], advantage[2][1] = -0.7, 0.9
    return {
        "mask": [[float(kept) for kept in row] for row in MASK],
        "logprob": logprob,
        "old": old,
        "engine": near(0.4),
        "reference": near(0.5),
        "advantage": advantage,
        "sequence_advantage": [[value] * len(MASK[0]) for value in (0.8, 1.1, -0.4, -0.6)],
        "value": rows(0.3, 0.4),
        "old_value": rows(0.3, 0.4),
        "target": rows(0.5, 0.4),
    }
