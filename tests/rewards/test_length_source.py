"""DAPO's soft overlong punishment."""

from __future__ import annotations

import pytest

from conf.errors import ConfigError
from conf.schema import Level, SourceConfig
from rewards.base import Source
from rewards.drawn import parse_tree
from rewards.sources.length import soft_overlong
from rollout.tree import Node


def trajectory(*lengths: int) -> list[Node]:
    """Steps of so many sampled tokens, each followed by three of the environment's."""
    tree = parse_tree(" -> ".join(["q", *(f"s{place}" for place in range(len(lengths)))]), observation_tokens=3)
    for node, length in zip(tree.nodes, lengths, strict=True):
        node.action_ids = [7] * length
    return tree.nodes


@pytest.mark.parametrize(
    ("lengths", "penalty"),
    [((16384,), 0), ((10000, 8432), -0.5), ((20480,), -1), ((30000,), -1), ((100,), 0), ((16384, 1024), -0.25)],
)
def test_penalty_falls_in_a_straight_line_over_the_last_tokens(lengths, penalty):
    assert soft_overlong(trajectory(*lengths), max_tokens=20480, buffer_tokens=4096) == penalty


def test_factor_is_the_whole_penalty():
    assert soft_overlong(trajectory(6), max_tokens=8, buffer_tokens=4, factor=3.0) == -1.5


@pytest.mark.parametrize("buffer_tokens", [0, -1, 9])
def test_slope_must_fit(buffer_tokens):
    with pytest.raises(ValueError, match=f"buffer_tokens={buffer_tokens} must be above 0 and at most max_tokens=8"):
        soft_overlong(trajectory(6), max_tokens=8, buffer_tokens=buffer_tokens)


def test_it_scores_trajectories_with_limits_from_the_config():
    tree = parse_tree("q -> a -> (b, c -> d)")
    cfg = SourceConfig(fn="rewards.sources.length:soft_overlong", args={"max_tokens": 4, "buffer_tokens": 2})
    source = Source("length", cfg)
    assert source.level is Level.trajectory
    assert {row: score.value for row, score in source.score_tree(tree).items()} == {1: 0, 3: -0.5}


def test_limits_that_are_not_given_are_refused_before_the_run():
    with pytest.raises(ConfigError, match='nothing can fill the argument "max_tokens"'):
        Source("length", SourceConfig(fn="rewards.sources.length:soft_overlong"), columns=["question"])
