"""What an evaluation found: pass@k, pass^k, majority, best of k, weighted vote, how sure, and what it could see."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean

from conf.errors import RewardFailed
from conf.schema import StepFold
from rewards.numbers import number_in
from rewards.sources.outcome import normalized
from rl.outcomes import PromptOutcome, Sample
from rl.statistics import (
    Interval,
    Spread,
    best_of_k,
    detectable_difference,
    mean_interval,
    pass_all_k,
    pass_at_k,
    prompts_needed,
    spread_of,
    standard_error,
    vote,
)

Score = Callable[[Sample], float | None]
"""What a sample is chosen by; None where it has no score."""
AnswerKey = Callable[[str], Hashable]
"""Equal for answers that mean the same; None for a text that holds no answer."""
BARE_NUMBER = re.compile(r"[-+]?\$?[0-9][0-9,]*(?:\.[0-9]+)?%?")


POWER_DIFFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2)
POWER_SAMPLES = (1, 4, 16)


@dataclass(frozen=True, slots=True)
class PowerRow:
    """What it takes to tell one difference from chance."""

    difference: float
    """In success share."""
    prompts: dict[int, int]
    """Samples of each prompt -> prompts of each of two evaluations."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts."""

    value: float
    interval: Interval
    num_prompts: int
    """Prompts that it could be said of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What one evaluation found."""

    estimates: dict[str, Estimate]
    """By name: success, pass_at_4, pass_all_4, majority, best_of_4, weighted_vote. `success` is pass@1: the mean over
    prompts of the share of right samples."""
    standard_error: float
    """Of `success`, over prompts; NaN for a single one."""
    num_prompts: int
    num_samples: int
    unknown: dict[str, int]
    """Why a sample's success is not known -> samples; they count neither as successes nor as failures."""
    spread: Spread | None
    """None where one sample of each prompt cannot tell."""
    mean_tokens: float
    """Sampled tokens of a trajectory."""

    @property
    def success_share(self) -> float:
        """Share of held-out prompts answered rightly, each prompt the mean of its samples."""
        return self.estimates["success"].value

    @property
    def unknown_share(self) -> float:
        """Of all samples."""
        return sum(self.unknown.values()) / self.num_samples

    def detectable_difference(self, samples: int) -> float:
        """The smallest difference in success to another evaluation of this size that is told from chance, found with
        chance 0.8; an upper bound where both answer the same prompts, which `grove compare` pairs."""
        return detectable_difference(self.whole_spread, self.num_prompts, samples)

    @property
    def whole_spread(self) -> Spread:
        """`spread`; where one sample of each prompt cannot tell the two apart, all of it between prompts."""
        share = self.success_share
        return self.spread or Spread(between=share * (1 - share), within=0.0)

    def power_table(self) -> list[PowerRow]:
        """How many prompts it takes to tell differences apart; with more samples of each where it is known what they
        would bring. Empty where all samples came out alike, which says nothing of other models."""
        whole = self.whole_spread
        columns = POWER_SAMPLES if self.spread else (1,)
        if not whole.between + whole.within:
            return []
        return [
            PowerRow(difference, {samples: prompts_needed(whole, difference, samples) for samples in columns})
            for difference in POWER_DIFFERENCES
        ]


def evaluation_of(
    outcomes: Sequence[PromptOutcome],
    ks: Sequence[int] = (),
    score: Score | None = None,
    answer_key: AnswerKey = normalized,
    seed: int = 0,
) -> Evaluation:
    """Everything that can be said of an evaluation.

    A sample whose success is not known is left out of everything; a prompt that has too few others is left out of what
    needs more, and every estimate says how many prompts it is of.

    Args:
        ks: of pass@k, pass^k and best of k, beside 1.
        score: what best-of-k and the weighted vote go by; None for neither.
        answer_key: says which answers are the same, for votes.
        seed: of the bootstrap.
    Raises: RewardFailed when not one sample's success is known.
    """
    samples = [sample for each in outcomes for sample in each.samples]
    unknown = Counter(sample.unknown for sample in samples if sample.success is None)
    known = [each.known for each in outcomes if each.known]
    if not known:
        reasons = ", ".join(f"{reason} ({num})" for reason, num in unknown.most_common(3)) or "there was none"
        raise RewardFailed(
            f"none of {len(samples)} held-out trajectories was scored: success is unknown, not 0. Reasons: {reasons}. "
            "Look at the failed scores in the run's logs/."
        )
    num_P, right_P = [len(each) for each in known], [sum(sample.success is True for sample in each) for each in known]
    values: dict[str, list[float]] = {"success": [right / num for num, right in zip(num_P, right_P, strict=True)]}
    for k in sorted({k for k in ks if k > 1}):
        enough = [(num, right) for num, right in zip(num_P, right_P, strict=True) if num >= k]
        values[f"pass_at_{k}"] = [pass_at_k(num, right, k) for num, right in enough]
        values[f"pass_all_{k}"] = [pass_all_k(num, right, k) for num, right in enough]
    if max(num_P) > 1:
        values |= _votes(known, score, answer_key)
        values |= _bests(known, score, ks)
    return Evaluation(
        estimates={
            name: Estimate(fmean(each), mean_interval(each, seed), len(each)) for name, each in values.items() if each
        },
        standard_error=standard_error(values["success"]),
        num_prompts=len(known),
        num_samples=len(samples),
        unknown=dict(unknown.most_common()),
        spread=spread_of(num_P, right_P),
        mean_tokens=fmean(sample.tokens for sample in samples),
    )


def _success(sample: Sample) -> float:
    return float(bool(sample.success))


def _votes(known: Sequence[list[Sample]], score: Score | None, key: AnswerKey) -> dict[str, list[float]]:
    """Majority, and the vote weighted by scores; empty for a task whose trajectories give no answers."""
    if all(sample.answer is None for each in known for sample in each):
        return {}
    values = {"majority": [vote(_keys(each, key), [*map(_success, each)]) for each in known]}
    if score is not None:
        scored = [_scored(each, score) for each in known]
        values["weighted_vote"] = [
            vote(_keys(samples, key), [*map(_success, samples)], weights) for samples, weights in scored if samples
        ]
    return values


def _bests(known: Sequence[list[Sample]], score: Score | None, ks: Sequence[int]) -> dict[str, list[float]]:
    if score is None:
        return {}
    scored = [_scored(each, score) for each in known]
    return {
        f"best_of_{k}": [best_of_k(scores, [*map(_success, each)], k) for each, scores in scored if len(each) >= k]
        for k in sorted({k for k in ks if k > 1})
    }


def _scored(samples: Sequence[Sample], score: Score) -> tuple[list[Sample], list[float]]:
    """The samples that have a score, and the scores."""
    pairs = [(sample, value) for sample in samples if (value := score(sample)) is not None]
    return [sample for sample, _ in pairs], [value for _, value in pairs]


def _keys(samples: Sequence[Sample], key: AnswerKey) -> list[Hashable]:
    return [None if sample.answer is None else key(sample.answer) for sample in samples]


def chosen_by(source: str, fold: StepFold) -> Score:
    """A sample's score by one source; for a source of steps, what `fold` makes of its steps' scores.

    Where the source failed on one of its steps, the sample has no score: what the others come to is not its own.
    """

    def score(sample: Sample) -> float | None:
        if source in sample.scores:
            return sample.scores[source]
        return folded(sample.step_scores.get(source, []), fold)

    return score


def folded(step_scores: Sequence[float | None], fold: StepFold) -> float | None:
    """A trajectory's score from its steps'; [.9, .4, .2] gives min .2, product .072, mean .5, last .2, sum 1.5.

    Returns: None where there is no step, or one without a score.
    """
    values = [value for value in step_scores if value is not None]
    if not values or len(values) < len(step_scores):
        return None
    match fold:
        case StepFold.min:
            return min(values)
        case StepFold.product:
            return math.prod(values)
        case StepFold.mean:
            return fmean(values)
        case StepFold.last:
            return values[-1]
        case StepFold.sum:
            return math.fsum(values)


def numeric_key(answer: str) -> Fraction | None:
    """The number that an answer gives, as `rewards.sources.outcome:numeric_match` reads it."""
    return number_in(answer)


def text_key(answer: str) -> Hashable:
    """The number, where an answer is nothing but one ("7", "7.0", "$1,000"), else the text up to case and space."""
    text = normalized(answer)
    if not text:
        return None
    return number_in(text) if BARE_NUMBER.fullmatch(text) else text


def default_ks(samples: int) -> list[int]:
    """1, 2, 4 ... and the number of samples itself."""
    powers = [2**power for power in range(samples.bit_length()) if 2**power <= samples]
    return sorted({*powers, samples})
