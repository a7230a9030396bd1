"""Random groups of chains that the recording scripts and the tests share, as plain numbers that JSON keeps exactly."""

from __future__ import annotations

import random
from typing import Any

GROUP_SIZES = [4, 4, 1, 3]
"""Trajectories of each prompt."""
EVEN_GROUP = 1
"""The prompt whose trajectories all earn the same."""


def advantage_inputs(seed: int = 0) -> dict[str, Any]:
    """Trajectory by trajectory: `prompt`, tokens of each step, two rewards of the whole, and a value for each token."""
    rng = random.Random(seed)
    prompt = [group for group, size in enumerate(GROUP_SIZES) for _ in range(size)]
    steps = [[rng.randint(1, 3) for _ in range(rng.randint(1, 4))] for _ in prompt]
    return {
        "prompt": prompt,
        "steps": steps,
        "reward": [0.5 if group == EVEN_GROUP else round(rng.random(), 3) for group in prompt],
        "other_reward": [round(rng.random(), 3) for _ in prompt],
        "value": [[round(rng.gauss(0.4, 0.3), 3) for _ in range(sum(lengths))] for lengths in steps],
    }
