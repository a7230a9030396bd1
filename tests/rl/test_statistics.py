from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.statistics import (
    Interval,
    Spread,
    best_of_k,
    bootstrap_difference,
    bootstrap_means,
    bootstrap_runs,
    detectable_difference,
    mean_interval,
    pass_all_k,
    pass_at_k,
    percentile_interval,
    prompts_needed,
    runs_per_arm,
    spread_of,
    standard_error,
    vote,
    wilson_interval,
)

RIGHT = [int(count) for count in "01100111000142021140430040220122003443413241222144"]
"""Trials of 4 that succeeded in each of tau-bench's 50 airline tasks, by gpt-4o (sierra-research/tau-bench)."""

MIXED = [
    ("01121340", "01101000", [-2.6875, 0.0564, 0.3633, -0.5273, 0.1621, -1.2188, -1.7891, -2.2813]),
    ("00110011", "11001100", [0.5156, 0.5313, -0.5859, -0.3750, 0.5469, 0.5313, -1.1484, -0.4375]),
    ("00121345", "00101000", [-0.4219, 0.3652, -0.4902, -1.5391, -0.7617, -1.0781, -0.4688, -2.0469]),
    ("01112111", "01110111", [-2.5781, 0.9648, 0.9844, 1.0156, -0.8672, 1.2734, 0.8438, 1.2188]),
    ("01123456", "00001000", [-2.8906, -1.3047, -1.5313, -0.9141, -0.1865, -1.7266, -1.1797, -2.1406]),
    ("01011001", "10100110", [4.6250, -3.5938, 4.6250, -3.4375, -3.5938, 4.3125, 4.6250, -3.3906]),
    ("01100100", "01100100", [0.7344, 2.1094, 2.0938, 1.2578, 0.9922, 1.7109, 1.0156, 0.9219]),
    ("00010000", "11101111", [1.3906, 1.7266, 1.3984, 0.5898, 1.2422, 0.9922, 1.4297, 1.2031]),
    ("01211111", "01011111", [-2.5156, 1.1563, -3.8594, 1.3125, 1.1797, 1.3125, 1.1875, 1.3516]),
    ("01002310", "10110001", [0.6797, 2.2969, 0.5977, -0.2080, -0.4863, -1.9297, 2.2344, 0.5000]),
]
"""Answers (equal figures, equal answers), whether right, and a reward model's scores: the 10 problems of QwenLM's
math_cot_100.jsonl whose 8 samples differ in success. Of the other 90 all samples are right (86) or all wrong (4)."""


def over_100(value_of) -> float:
    """Mean over the 100 problems of something that is 1 for an all-right problem and 0 for an all-wrong one."""
    return (
        86 + sum(value_of(answers, [int(mark) for mark in right], scores) for answers, right, scores in MIXED)
    ) / 100


def test_three_right_of_ten():
    chances = {k: (pass_at_k(10, 3, k), pass_all_k(10, 3, k)) for k in (1, 3, 5)}
    assert chances[1] == (pytest.approx(0.3), pytest.approx(0.3))
    assert chances[3] == (pytest.approx(1 - 35 / 120), pytest.approx(1 / 120))
    assert chances[5] == (pytest.approx(1 - 21 / 252), 0)


@given(num=st.integers(1, 7), right=st.integers(0, 7), k=st.integers(1, 7))
def test_pass_at_k_and_pass_all_k_are_means_over_all_subsets(num: int, right: int, k: int):
    right, k = min(right, num), min(k, num)
    subsets = list(itertools.combinations([1] * right + [0] * (num - right), k))
    assert pass_at_k(num, right, k) == pytest.approx(statistics.fmean(map(any, subsets)))
    assert pass_all_k(num, right, k) == pytest.approx(statistics.fmean(map(all, subsets)))


@pytest.mark.parametrize(
    ("k", "every", "any_of_them"), [(1, 0.42, 0.42), (2, 0.2733, 0.5667), (3, 0.22, 0.66), (4, 0.20, 0.72)]
)
def test_published_numbers_of_tau_bench(k: int, every: float, any_of_them: float):
    assert statistics.fmean(pass_all_k(4, right, k) for right in RIGHT) == pytest.approx(every, abs=5e-5)
    assert statistics.fmean(pass_at_k(4, right, k) for right in RIGHT) == pytest.approx(any_of_them, abs=5e-5)


def test_samples_of_a_task_resemble_each_other_so_counting_them_one_by_one_claims_too_much():
    naive = math.sqrt(0.42 * 0.58 / 200)
    assert standard_error([right / 4 for right in RIGHT]) == pytest.approx(0.0522, abs=5e-5)
    assert naive == pytest.approx(0.0349, abs=5e-5)
    spread = spread_of([4] * 50, RIGHT)
    assert spread is not None and spread.correlation == pytest.approx(0.405, abs=5e-4)
    # 1 + 3 * 0.405 = 2.21 samples are worth one; its root is about the ratio of the two errors
    assert spread.design_effect(4) == pytest.approx(2.214, abs=1e-3)
    assert spread.error(50, 4) == pytest.approx(0.0522, abs=5e-5)


def test_published_numbers_of_a_reward_model_on_math():
    def is_any(answers, right, scores):
        return any(right)

    assert over_100(lambda answers, right, scores: sum(right) / 8) == pytest.approx(0.91)
    assert over_100(is_any) == pytest.approx(0.96)
    assert over_100(lambda answers, right, scores: best_of_k(scores, right, 8)) == pytest.approx(0.94)
    assert over_100(lambda answers, right, scores: vote(answers, right, scores)) == pytest.approx(0.94)
    sigmoid = lambda score: 1 / (1 + math.exp(-score))  # noqa: E731
    assert over_100(lambda a, right, scores: vote(a, right, list(map(sigmoid, scores)))) == pytest.approx(0.94)


def test_of_answers_that_tie_each_has_its_share_of_the_vote():
    # three of the ten problems tie; the released script takes the answer seen first, which gives 0.93
    def first_seen(answers, right, scores):
        return right[answers.index(Counter(answers).most_common(1)[0][0])]

    assert over_100(first_seen) == pytest.approx(0.93)
    assert over_100(lambda answers, right, scores: vote(answers, right)) == pytest.approx(0.925)
    ties = [
        answers for answers, _, _ in MIXED if [n for _, n in Counter(answers).most_common(2)][0:2] in ([4, 4], [2, 2])
    ]
    assert len(ties) == 3


def test_majority_best_and_weighted_vote_can_all_differ():
    answers, scores = [7, 7, 9, 9, 9], [0.9, 0.8, 0.3, 0.2, 0.4]
    seven, nine = [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]
    assert (vote(answers, nine), best_of_k(scores, seven, 5), vote(answers, seven, scores)) == (1, 1, 1)  # 1.7 to 0.9


def test_who_gives_no_answer_has_no_vote():
    assert vote([None, None, "a"], [0, 0, 1]) == 1
    assert vote([None, None], [0, 0]) == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6), st.integers(1, 6))
def test_best_of_k_is_the_mean_over_all_subsets_in_which_equal_scores_share(samples, k: int):
    k = min(k, len(samples))

    def best(subset) -> float:
        top = max(score for score, _ in subset)
        return statistics.fmean(success for score, success in subset if score == top)

    slow = statistics.fmean(best(subset) for subset in itertools.combinations(samples, k))
    scores, successes = [score for score, _ in samples], [float(success) for _, success in samples]
    assert best_of_k(scores, successes, k) == pytest.approx(slow)


@given(st.permutations(range(8)))
def test_no_order_of_the_samples_changes_a_vote(order):
    answers, right, scores = MIXED[5]
    shuffled = [(answers[at], int(right[at]), scores[at]) for at in order]
    again = vote(*map(list, zip(*shuffled, strict=True)))
    assert again == vote(answers, [int(mark) for mark in right], scores)


def test_bootstrap_draws_prompts_and_keeps_their_samples_together():
    value_P = [right / 4 for right in RIGHT]
    mean_B = bootstrap_means(value_P, 4000, seed=0)
    assert mean_B.shape == (4000,) and mean_B.mean() == pytest.approx(0.42, abs=0.003)
    # the bootstrap's deviation is the clustered error, with P instead of P - 1 below the root
    assert mean_B.std() == pytest.approx(0.0517, rel=0.05)
    assert np.array_equal(mean_B, bootstrap_means(value_P, 4000, seed=0))


def test_bootstrap_equals_a_slow_obvious_one():
    value_P = [0.0, 0.25, 1.0, 0.5]
    rng = np.random.default_rng(1)
    slow = [statistics.fmean(value_P[at] for at in rng.integers(0, 4, 4)) for _ in range(20_000)]
    fast = bootstrap_means(value_P, 20_000, seed=2)
    for share in (0.025, 0.25, 0.5, 0.75, 0.975):
        assert np.quantile(fast, share) == pytest.approx(np.quantile(slow, share), abs=0.0626)  # one step is 1/16
    assert fast.var() == pytest.approx(np.var(slow), rel=0.05)


def test_large_bootstraps_come_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rl.statistics.MAX_CELLS", 100)
    mean_B = bootstrap_means([0.0, 1.0] * 20, 1001, seed=0)
    assert mean_B.shape == (1001,) and mean_B.mean() == pytest.approx(0.5, abs=0.02)


def test_what_makes_prompts_hard_drops_out_of_a_paired_difference():
    easy_and_hard = np.array([[0.0, 1.0] * 20])
    better = easy_and_hard * 0.9 + 0.1  # each prompt gains up to 0.1
    paired = bootstrap_difference(better, easy_and_hard, 2000, seed=0)
    assert paired.mean() == pytest.approx(0.05, abs=0.005)
    assert paired.std() == pytest.approx(0.05 / math.sqrt(40), rel=0.1)
    apart = bootstrap_means(better[0], 2000, seed=1) - bootstrap_means(easy_and_hard[0], 2000, seed=2)
    assert apart.std() > 10 * paired.std()


def test_runs_are_drawn_beside_prompts():
    # two runs that differ on every prompt alike: only the draw of the runs moves the mean, to 0, 1/2 or 1
    mean_B = bootstrap_runs([[0.0] * 30, [1.0] * 30], 4000, seed=0)
    assert {round(float(mean), 9) for mean in mean_B} == {0.0, 0.5, 1.0}
    assert mean_B.mean() == pytest.approx(0.5, abs=0.03)


def test_tables_of_different_prompts_are_not_compared():
    with pytest.raises(AssertionError, match="the same prompts"):
        bootstrap_difference([[1.0, 0.0]], [[1.0]], 10, seed=0)


def test_wilson_interval_of_21_of_50():
    found = wilson_interval(21, 50)
    assert (found.low, found.high) == (pytest.approx(0.2938, abs=5e-5), pytest.approx(0.5577, abs=5e-5))
    assert wilson_interval(0, 10).low == 0 and 0.25 < wilson_interval(0, 10).high < 0.3
    assert wilson_interval(10, 10).high == 1


def test_an_interval_is_by_bootstrap_unless_every_prompt_is_0_or_1():
    assert mean_interval([1.0] * 10, seed=0) == wilson_interval(10, 10)  # a bootstrap would claim certainty
    found = mean_interval([0.5, 0.25, 0.75, 0.5], seed=0)
    assert isinstance(found, Interval) and 0.25 < found.low < 0.5 < found.high < 0.75


def test_the_middle_of_the_draws():
    found = percentile_interval(np.arange(101), confidence=0.9)
    assert (found.low, found.high) == (pytest.approx(5), pytest.approx(95))


def test_a_single_prompt_has_no_known_error():
    assert math.isnan(standard_error([1.0]))
    assert spread_of([4], [2]) is None and spread_of([1, 1, 1], [1, 0, 1]) is None


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=2, max_size=12))
def test_spread_with_unequal_samples_agrees_with_sums_written_out(counts):
    num_P = [num for num, _ in counts]
    right_P = [min(right, num) for num, right in counts]
    found = spread_of(num_P, right_P)
    rows = [[1.0] * right + [0.0] * (num - right) for num, right in zip(num_P, right_P, strict=True)]
    everything = [value for row in rows for value in row]
    if len(everything) == len(rows):
        assert found is None
        return
    assert found is not None
    within = sum((value - statistics.fmean(row)) ** 2 for row in rows for value in row)
    assert found.within == pytest.approx(within / (len(everything) - len(rows)))
    assert 0 <= found.correlation <= 1 and found.between >= 0


@pytest.mark.parametrize(
    ("deviation", "difference", "runs"),
    [(1.5, 1, 36), (1.5, 2, 9), (1.5, 3, 4), (1.8, 1, 51), (1.8, 2, 13), (1.8, 3, 6)],
)
def test_runs_that_a_difference_takes(deviation: float, difference: float, runs: int):
    assert runs_per_arm(difference, deviation) == runs  # 15.70 / (D / s)^2, rounded up


def test_pairs_take_half_as_many():
    assert runs_per_arm(1, 2, paired=True) == 32  # 7.85 * 4 = 31.4


def test_prompts_needed_is_where_the_difference_becomes_detectable():
    spread = Spread(between=0.1, within=0.15)
    for samples in (1, 4):
        prompts = prompts_needed(spread, 0.05, samples)
        assert (
            detectable_difference(spread, prompts, samples)
            <= 0.05
            < detectable_difference(spread, prompts - 1, samples)
        )
    # 15.70 * 0.25 / 0.0025 with one sample; with four, 0.1 + 0.15 / 4 instead of 0.25
    assert prompts_needed(spread, 0.05, 1) == 1570 and prompts_needed(spread, 0.05, 4) == 864
