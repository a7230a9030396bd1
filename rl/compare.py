"""Compares groups of runs at a point that all have reached: means, intervals over seeds and tasks, and what is noise.

An interval spans two: the bootstrap over seeds and held-out prompts, and Student's t over seeds. Drawing three seeds
again and again never shows how different a fourth may be; t is made for that, but knows nothing of the prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from conf.errors import ConfigError
from rl.compared import ComparedRun, Group, find_runs, groups_of, incomparable
from rl.curves import is_better_high
from rl.statistics import (
    BOOTSTRAP_DRAWS,
    CONFIDENCE,
    Interval,
    bootstrap_difference,
    bootstrap_runs,
    percentile_interval,
    runs_per_arm,
    wilson_interval,
)

SUCCESS = "eval/success_share"
SEED = 0
"""Of the bootstrap: the same runs give the same table."""
MAX_SEEDS = 1000
"""More are shown as "more than 1000"."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one group came to."""

    group: Group
    values: list[float]
    """Of each run, in the order of the group's runs."""
    interval: Interval | None
    """Of the mean; None for one run of which no prompts are known."""
    num_prompts: int
    """Held-out prompts that the interval is over; 0 where the runs have recorded none."""

    @property
    def mean(self) -> float:
        """Over runs."""
        return statistics.fmean(self.values)


@dataclass(frozen=True, slots=True)
class Difference:
    """A group against the baseline."""

    group: Group
    refused: str = ""
    """Why the two cannot be compared; then nothing else is known."""
    mean: float = math.nan
    interval: Interval | None = None
    is_paired: bool = False
    """Whether seeds are compared one by one, for both have the same."""
    deviation: float | None = None
    """Of the differences of a pair, or of one run; None with one seed."""

    @property
    def is_noise(self) -> bool:
        """True unless the interval keeps clear of 0 and more than one seed was trained."""
        if self.deviation is None or self.interval is None:
            return True
        return self.interval.low <= 0 <= self.interval.high

    @property
    def seeds_needed(self) -> int | None:
        """Seeds of each side with which a true difference of this size is found in four of five tries."""
        if not self.deviation or not self.mean:
            return None
        return max(2, runs_per_arm(self.mean, self.deviation, paired=self.is_paired))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Groups of runs at one point."""

    metric: str
    by_steps: bool
    place: float
    """Tokens or steps that every run has reached."""
    results: list[Result]
    differences: list[Difference]
    """Of each group but the first, against the first."""
    notes: list[str]


def compare(paths: Sequence[Path], metric: str = SUCCESS, *, by_steps: bool = False, baseline: str = "") -> Comparison:
    """Compare runs and sweeps.

    Args:
        paths: folders of runs and of sweeps.
        metric: as in metrics.jsonl.
        by_steps: at equally many steps instead of generated tokens.
        baseline: label of the group that the others are compared with; the first one by default.
    Raises: ConfigError, DataError when there is nothing to compare.
    """
    is_better_high(metric)
    runs, notes = find_runs(paths, metric, by_steps=by_steps)
    if not runs:
        said = "".join(f"\n  {note}" for note in notes)
        raise ConfigError(f"none of the runs has any {metric}: there is nothing to compare.{said}")
    place, more = common_place(runs, by_steps=by_steps)
    groups = with_first(groups_of(runs), baseline)
    results = [result(group, metric, place) for group in groups]
    differences = [difference(results[0], each, place, metric) for each in results[1:]]
    return Comparison(metric, by_steps, place, results, differences, [*notes, *more])


def common_place(runs: Sequence[ComparedRun], *, by_steps: bool) -> tuple[float, list[str]]:
    """The last point that all runs have reached, and a word on runs that went much further."""
    shortest = min(runs, key=lambda run: run.curve[-1][0])
    longest = max(runs, key=lambda run: run.curve[-1][0])
    place, unit = shortest.curve[-1][0], "steps" if by_steps else "generated tokens"
    if max(run.curve[0][0] for run in runs) > place:
        raise ConfigError(f"{shortest.folder} ends at {place:,.0f} {unit}, before others have a first value.")
    if longest.curve[-1][0] > 1.1 * place:
        note = (
            f"compared at {place:,.0f} {unit}, where {shortest.folder} ends; {longest.folder} went on to "
            f"{longest.curve[-1][0]:,.0f}"
        )
        return place, [note]
    return place, []


def with_first(groups: list[Group], baseline: str) -> list[Group]:
    """The groups with the baseline in front.

    Raises: ConfigError when no group is called so.
    """
    if not baseline:
        return groups
    if baseline not in [group.label for group in groups]:
        labels = ", ".join(f'"{group.label}"' for group in groups)
        raise ConfigError(f'no group is called "{baseline}"; there are {labels}.')
    return sorted(groups, key=lambda group: group.label != baseline)


def result(group: Group, metric: str, place: float) -> Result:
    """Mean of a group with its interval."""
    values = [run.value_at(place) for run in group.runs]
    table = prompt_table([group], place)[0] if metric == SUCCESS else []
    intervals = []
    if table and table[0]:
        intervals.append(percentile_interval(bootstrap_runs(table, BOOTSTRAP_DRAWS, SEED)))
        if statistics.fmean(values) in (0.0, 1.0):  # all alike: drawing them again shows no spread
            intervals.append(wilson_interval(values[0] * len(table[0]), len(table[0])))
    if len(values) > 1:
        intervals.append(t_interval(values))
    return Result(group, values, widest(intervals), len(table[0]) if table else 0)


def difference(base: Result, other: Result, place: float, metric: str) -> Difference:
    """A group less the baseline."""
    refused = incomparable(base.group, other.group)
    if refused:
        return Difference(other.group, refused=refused)
    one, two = _by_seed(base), _by_seed(other)
    is_paired = one.keys() == two.keys() and len(one) == len(base.values) and len(two) == len(other.values)
    mean, deviation, intervals = other.mean - base.mean, None, []
    if is_paired and len(one) > 1:
        differences = [two[seed] - one[seed] for seed in one]
        deviation = statistics.stdev(differences)
        intervals.append(t_interval(differences))
    elif min(len(base.values), len(other.values)) > 1:
        deviation = math.sqrt((statistics.variance(base.values) + statistics.variance(other.values)) / 2)
        intervals.append(welch_interval(other.values, base.values))
    if metric == SUCCESS:
        first, second = prompt_table([base.group, other.group], place)
        if first and first[0]:
            intervals.append(percentile_interval(bootstrap_difference(second, first, BOOTSTRAP_DRAWS, SEED)))
    return Difference(other.group, "", mean, widest(intervals), is_paired, deviation)


def _by_seed(result: Result) -> dict[Any, float]:
    return dict(zip(result.group.seeds, result.values, strict=True))


def prompt_table(groups: Sequence[Group], place: float) -> list[list[list[float]]]:
    """Success of each prompt in each run of each group, [G][R][P], of the prompts that all runs know something of."""
    found = [[run.outcomes_at(place) for run in group.runs] for group in groups]
    every = [outcomes for runs in found for outcomes in runs]
    names = [name for name in every[0] if all(name in outcomes for outcomes in every)]
    return [[[outcomes[name] for name in names] for outcomes in runs] for runs in found]


def t_interval(values: Sequence[float]) -> Interval:
    """Student's interval of a mean: m +- t s / sqrt(n). Of 1, 2, 3: 2 +- 4.303 * 1 / sqrt(3)."""
    half = _t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return Interval(mean - half, mean + half)


def welch_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Of the difference of two means whose spreads may differ (Welch)."""
    parts = [statistics.variance(each) / len(each) for each in (values, others)]
    error, mean = math.sqrt(sum(parts)), statistics.fmean(values) - statistics.fmean(others)
    if not error:
        return Interval(mean, mean)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(each) - 1) for part, each in zip(parts, (values, others), strict=True)
    )
    return Interval(mean - _t(freedom) * error, mean + _t(freedom) * error)


def _t(freedom: float) -> float:
    return float(student_t.ppf((1 + CONFIDENCE) / 2, freedom))


def widest(intervals: Sequence[Interval]) -> Interval | None:
    """From the lowest end to the highest."""
    if not intervals:
        return None
    return Interval(min(each.low for each in intervals), max(each.high for each in intervals))
