"""From source scores to signals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.schema import RewardsConfig, SourceConfig
from rewards.blend import blend, blended
from rewards.drawn import parse_tree
from rewards.types import Score, ScoredTree, ScoreStatus

numbers = st.floats(-100, 100)


def scored(**step_scores: Score) -> ScoredTree:
    return ScoredTree(tree=parse_tree("q -> a"), step_scores={name: {0: score} for name, score in step_scores.items()})


def sources(**weights: float) -> RewardsConfig:
    return RewardsConfig(sources={name: SourceConfig(fn="a.py:f", weight=weight) for name, weight in weights.items()})


def test_signal_is_the_weighted_sum_of_its_sources():
    # 2 * 0.5 + 10 * 0.1 = 2
    both = blend(scored(judge=Score(0.5), format=Score(0.1)), sources(judge=2.0, format=10.0))
    assert both.step_signals == {"step": {0: Score(2.0)}}


def test_source_of_weight_zero_is_recorded_and_not_blended():
    both = blend(scored(judge=Score(0.5), tool=Score.failed("down")), sources(judge=1.0, tool=0.0))
    assert both.step_signals == {"step": {0: Score(0.5)}}
    assert both.step_scores["tool"][0].reason == "down"


def test_failed_source_is_not_zero_but_makes_the_signal_unknown():
    signal = blend(scored(judge=Score.failed("down"), format=Score(1.0)), sources(judge=1.0, format=1.0)).step_signals
    assert signal["step"][0].status is ScoreStatus.failed
    assert signal["step"][0].reason == "judge: down"


def test_timed_out_source_makes_the_signal_unknown():
    late = Score.timed_out("slow")
    signal = blend(scored(judge=late, format=Score(1.0)), sources(judge=1.0, format=1.0)).step_signals
    assert signal["step"][0].status is ScoreStatus.timed_out


def test_source_with_nothing_to_say_adds_nothing():
    silent = Score.not_applicable()
    assert blend(scored(tool=silent, format=Score(0.3)), sources(tool=5.0, format=1.0)).step_signals["step"] == {
        0: Score(0.3)
    }
    alone = blend(scored(tool=silent), sources(tool=5.0)).step_signals["step"][0]
    assert alone.status is ScoreStatus.not_applicable


def test_steps_and_trajectories_have_their_own_default_signals_and_a_source_may_name_another():
    tree = scored(judge=Score(1.0), depth=Score(3.0))
    tree.leaf_scores["answer"] = {0: Score(0.0)}
    cfg = sources(judge=1.0, depth=1.0, answer=1.0)
    cfg.sources["depth"].signal = "shape"
    both = blend(tree, cfg)
    assert both.step_signals == {"step": {0: Score(1.0)}, "shape": {0: Score(3.0)}}
    assert both.leaf_signals == {"outcome": {0: Score(0.0)}}
    assert tree.step_signals == {}  # the scored tree itself is as it was


def test_sum_that_overflows_is_unknown():
    assert blended([("a", 1e308, Score(10.0))]).status is ScoreStatus.failed


def test_weight_of_a_source_that_never_scored_is_refused():
    with pytest.raises(ConfigError, match=r'rewards.sources.judge has weight 1 but never scored prompt "test/0"'):
        blend(scored(format=Score(1.0)), sources(judge=1.0, format=1.0))


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6), st.randoms())
def test_order_of_sources_changes_nothing(pairs, random):
    said = [(f"s{place}", weight, Score(value)) for place, (weight, value) in enumerate(pairs)]
    shuffled = random.sample(said, len(said))
    assert blended(said) == blended(shuffled)


@given(st.lists(st.tuples(numbers, st.one_of(st.none(), numbers)), min_size=1, max_size=6))
def test_signal_agrees_with_a_plain_loop(pairs):
    said = [("s", weight, Score.not_applicable() if value is None else Score(value)) for weight, value in pairs]
    total, heard = 0.0, False
    for weight, value in pairs:
        if value is not None:
            total, heard = total + weight * value, True
    signal = blended(said)
    assert signal.is_scored == heard
    assert not heard or signal.value == pytest.approx(total, abs=1e-9)
