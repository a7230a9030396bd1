"""Statistics of evaluations: what several samples of a prompt come to, how sure a mean is, what differences it can see.

Everything is about prompts. Samples of one prompt resemble each other, so that counting them one by one would claim
more than was measured: each prompt gives one value, and prompts are what is drawn again.

Letters: P prompts, S samples of one prompt, R runs (seeds), B bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
"""Of every interval that is shown."""
POWER = 0.8
"""Chance that a difference which is there is found, for plans."""
BOOTSTRAP_DRAWS = 2000
MAX_CELLS = 4_000_000
"""Numbers that one piece of a bootstrap may hold at once."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the true mean may lie."""

    low: float
    high: float


def pass_at_k(num: int, right: int, k: int) -> float:
    """Chance that at least one of k samples is right, without bias: 1 - C(num - right, k) / C(num, k).

    HumanEval, arXiv 2107.03374. Of 10 samples with 3 right: k=1 gives 0.3, k=3 gives 1 - 35/120.

    Args:
        num: samples of the prompt whose outcome is known, at least k.
        right: those of them that succeeded.
    """
    _check_counts(num, right, k)
    return 1 - math.comb(num - right, k) / math.comb(num, k)


def pass_all_k(num: int, right: int, k: int) -> float:
    """Chance that all of k samples are right, pass^k, without bias: C(right, k) / C(num, k).

    tau-bench, arXiv 2406.12045. Of 10 samples with 3 right: k=3 gives 1/120.
    """
    _check_counts(num, right, k)
    return math.comb(right, k) / math.comb(num, k)


def _check_counts(num: int, right: int, k: int) -> None:
    assert 0 <= right <= num and 1 <= k <= num, f"k={k} samples of {num}, {right} of them right"


def best_of_k(score_S: Sequence[float], success_S: Sequence[float], k: int) -> float:
    """Expected success of the best scored of k samples, over all subsets of k; equal scores share.

    The best of k is in a group of equal scores with chance (C(n, k) - C(m, k)) / C(all, k), where n samples score as
    much or less and m less.

    Args:
        score_S: of each sample, in any unit: only their order counts.
        success_S: 1 or 0 (or a share) of each sample.
    """
    num = len(score_S)
    assert num == len(success_S) and 1 <= k <= num, f"k={k} of {num} scores and {len(success_S)} successes"
    expected = 0.0
    for score in set(score_S):
        below = sum(other < score for other in score_S)
        group = [success for other, success in zip(score_S, success_S, strict=True) if other == score]
        chance = (math.comb(below + len(group), k) - math.comb(below, k)) / math.comb(num, k)
        expected += chance * sum(group) / len(group)
    return expected


def vote(answer_S: Sequence[Hashable], success_S: Sequence[float], weight_S: Sequence[float] | None = None) -> float:
    """Success of the answer with the most votes; equally voted answers share, a vote without an answer is none.

    Args:
        answer_S: what each sample answered, equal where the answers mean the same; None without an answer.
        success_S: 1 or 0 of each sample; an answer's success is the mean over those who gave it.
        weight_S: weight of each vote, 1 by default.
    Returns: 0 where nobody answered.
    """
    weights = [1.0] * len(answer_S) if weight_S is None else weight_S
    votes: dict[Hashable, list[float]] = {}
    outcomes: dict[Hashable, list[float]] = {}
    for answer, success, weight in zip(answer_S, success_S, weights, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(weight)
            outcomes.setdefault(answer, []).append(success)
    if not votes:
        return 0.0
    # Exact sums: the order of the samples must not decide between equal votes.
    total = {answer: math.fsum(given) for answer, given in votes.items()}
    most = max(total.values())
    winners = [outcomes[answer] for answer, given in total.items() if given == most]
    return sum(sum(won) / len(won) for won in winners) / len(winners)


def bootstrap_means(value_P: ArrayLike, draws: int, seed: int) -> Floats:
    """Means of `draws` samples of P prompts, drawn with replacement: the cluster bootstrap, each prompt a cluster.

    Args:
        value_P: one value of each prompt, at least one.
    Returns: float64 [B].
    """
    return bootstrap_runs(np.asarray(value_P)[None], draws, seed)


def bootstrap_runs(value_RP: ArrayLike, draws: int, seed: int) -> Floats:
    """Means of what is drawn with replacement from R runs over the same P prompts, runs and prompts each by themselves.

    Args:
        value_RP: value of each prompt in each run, e.g. success under each seed.
    Returns: float64 [B].
    """
    return bootstrap_difference(value_RP, None, draws, seed)


def bootstrap_difference(value_RP: ArrayLike, other_RP: ArrayLike | None, draws: int, seed: int) -> Floats:
    """As `bootstrap_runs`, of the mean of `value_RP` less that of `other_RP`: runs apart, the prompts in common.

    Both are measured on the same prompts in the same order, so a draw takes the same prompts of both: what makes some
    prompts harder than others drops out. Their numbers of runs may differ.

    Returns: float64 [B].
    """
    rng = np.random.default_rng(seed)
    tables = [np.asarray(table, dtype=np.float64) for table in (value_RP, other_RP) if table is not None]
    num_prompts = tables[0].shape[1]
    assert all(table.ndim == 2 and table.size and table.shape[1] == num_prompts for table in tables), (
        f"runs over the same prompts, not tables of {[table.shape for table in tables]}"
    )
    pieces: list[Floats] = []
    left = draws
    while left:
        size = min(left, max(1, MAX_CELLS // num_prompts))
        share_BP = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=size) / num_prompts
        means = [_drawn_means(table, share_BP, rng) for table in tables]
        pieces.append(means[0] - means[1] if len(means) == 2 else means[0])
        left -= size
    return np.concatenate(pieces)


def _drawn_means(value_RP: Floats, share_BP: Floats, rng: np.random.Generator) -> Floats:
    num_runs = len(value_RP)
    share_BR = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=len(share_BP)) / num_runs
    return np.einsum("br,br->b", share_BR, share_BP @ value_RP.T)


def percentile_interval(mean_B: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The middle `confidence` of bootstrap draws."""
    low, high = np.quantile(np.asarray(mean_B), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def wilson_interval(right: float, num: int, confidence: float = CONFIDENCE) -> Interval:
    """Of a share `right` / `num` of independent trials; honest near 0 and 1, where a bootstrap has no width."""
    z = normal_quantile(confidence)
    share, shrink = right / num, 1 + z**2 / num
    middle = share + z**2 / (2 * num)
    half = z * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return Interval(
        low=(middle - half) / shrink if right else 0.0, high=(middle + half) / shrink if right < num else 1.0
    )


def mean_interval(value_P: ArrayLike, seed: int, confidence: float = CONFIDENCE) -> Interval:
    """Of the mean over prompts: by bootstrap over prompts, and by Wilson where every prompt's value is 0 or 1."""
    values = np.asarray(value_P, dtype=np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(float(values.sum()), len(values), confidence)
    return percentile_interval(bootstrap_means(values, BOOTSTRAP_DRAWS, seed), confidence)


def standard_error(value_P: ArrayLike) -> float:
    """Of the mean over prompts, from how much prompts differ; NaN for a single prompt, of which nothing is known."""
    values = np.asarray(value_P, dtype=np.float64)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclass(frozen=True, slots=True)
class Spread:
    """Where the variance of success comes from."""

    between: float
    """Variance of the prompts' chances of success."""
    within: float
    """Variance of one sample around its prompt's chance."""

    @property
    def correlation(self) -> float:
        """Of two samples of a prompt (ICC): 0 where the prompt tells nothing, 1 where it decides."""
        whole = self.between + self.within
        return self.between / whole if whole else 0.0

    def design_effect(self, samples: int) -> float:
        """How many samples of one prompt are worth an independent one: 1 + (samples - 1) * ICC."""
        return 1 + (samples - 1) * self.correlation

    def error(self, prompts: int, samples: int) -> float:
        """Standard error to expect of a mean over so many prompts with so many samples each."""
        return math.sqrt((self.between + self.within / samples) / prompts)


def spread_of(num_P: Sequence[int], right_P: Sequence[int]) -> Spread | None:
    """Variance between and within prompts, by one-way analysis of variance (unequal numbers of samples allowed).

    Args:
        num_P: samples of each prompt, prompts without one left out; right_P: those that succeeded.
    Returns: None where the two cannot be told apart: fewer than two prompts, or no prompt with two samples.
    """
    num, right = np.asarray(num_P, dtype=np.float64), np.asarray(right_P, dtype=np.float64)
    prompts, samples = len(num), num.sum()
    if prompts < 2 or samples == prompts:
        return None
    share = right / num
    within = float((right * (1 - share)).sum() / (samples - prompts))
    square = float((num * (share - right.sum() / samples) ** 2).sum() / (prompts - 1))
    usual = float((samples - (num**2).sum() / samples) / (prompts - 1))
    return Spread(between=max(0.0, (square - within) / usual), within=within)


def normal_quantile(confidence: float) -> float:
    """z of a two-sided interval: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def detectable_in_errors(confidence: float = CONFIDENCE, power: float = POWER) -> float:
    """The difference that is found with chance `power`, in standard errors of the difference: 2.80."""
    return normal_quantile(confidence) + NormalDist().inv_cdf(power)


def runs_per_arm(
    difference: float, deviation: float, *, paired: bool = False, confidence: float = CONFIDENCE, power: float = POWER
) -> int:
    """Runs (or prompts) that each of two sides needs for a difference to be found.

    Two independent sides: 2 (2.80 s / D)^2, s the deviation of one. Paired: (2.80 s / D)^2, s that of the differences.
    With s = 1.5 points, D = 1 needs 36 runs each, D = 2 needs 9.
    """
    factor = 1 if paired else 2
    return math.ceil(factor * (detectable_in_errors(confidence, power) * deviation / difference) ** 2 - 1e-9)


def detectable_difference(spread: Spread, prompts: int, samples: int) -> float:
    """The smallest difference that two evaluations of this size, on prompts of their own, tell apart."""
    return detectable_in_errors() * math.sqrt(2) * spread.error(prompts, samples)


def prompts_needed(spread: Spread, difference: float, samples: int) -> int:
    """Prompts that each of two evaluations needs to tell a difference apart, with so many samples of each."""
    return runs_per_arm(difference, spread.error(1, samples))
