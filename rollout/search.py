"""Arithmetic of tree search: which node next, and where the first error is."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


def puct(value: float, prior: float, num_parent: int, num_visits: int, c: float) -> float:
    """Q + c prior sqrt(N_parent) / (1 + N)      AlphaMath (arXiv 2405.03553)

    Args:
        value: mean value of the walks through the node; 0 before the first.
        prior: exp of the mean log-probability of the step's tokens.
        num_parent: visits of the parent; num_visits: of the node.
        c: weight of what was seldom tried; the authors take 1.25.
    """
    return value + c * prior * math.sqrt(num_parent) / (1 + num_visits)


def step_prior(logprobs: Sequence[float]) -> float:
    """exp(mean log-probability) of a step's tokens; 1 for a step of none."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 1.0


@dataclass(frozen=True, slots=True)
class WrongRollout:
    """A wrong completion from a state of OmegaPRM's search."""

    value: float
    """MC(s): share of right completions from its state."""
    length: int
    """Tokens of the completion."""
    num_visits: int
    """N(s): how often its state was chosen."""


def omega_scores(pool: Sequence[WrongRollout], alpha: float, beta: float, scale: int, c: float) -> list[float]:
    """Q + U of each rollout in the pool.

    Q = alpha^(1 - MC(s)) beta^(length / scale),  U = c sqrt(sum of N) / (1 + N(s))      OmegaPRM (arXiv 2406.06592)

    Prefers states that are nearly solved, and short wrong completions. The authors take alpha 0.5, beta 0.9, scale 500,
    c 0.125. Our reading: the sum goes over the pool.
    """
    total = math.sqrt(sum(each.num_visits for each in pool))
    return [
        alpha ** (1 - each.value) * beta ** (each.length / scale) + c * total / (1 + each.num_visits) for each in pool
    ]


def omega_choice(pool: Sequence[WrongRollout], alpha: float, beta: float, scale: int, c: float) -> int | None:
    """Number of the rollout to look for an error in next; None when no state is both sometimes solved and sometimes
    not: where MC is 1 nothing is wrong, and where it is 0 the error came before."""
    scores = omega_scores(pool, alpha, beta, scale, c)
    able = [number for number, each in enumerate(pool) if 0 < each.value < 1]
    return max(able, key=lambda number: scores[number]) if able else None


async def first_error(probe: Callable[[int], Awaitable[float]], num_steps: int) -> int:
    """The first step of a wrong solution from which none comes right, in log2(num_steps) probes.

    Where the shares are above 0 up to some step and 0 from there on, that step. Otherwise some step of share 0 whose
    predecessor's is above 0, or the first. The last step is taken to be wrong and is not probed.

    Args:
        probe: step, from 0 -> share of right completions from behind it.
        num_steps: 1 or more.
    """
    assert num_steps > 0, "a solution has steps"
    low, high = 0, num_steps - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if await probe(middle) > 0 else (low, middle)
    return low
