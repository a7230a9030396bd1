"""What a world says, as rewards."""

from __future__ import annotations

import pytest

from conf.schema import Level, SourceConfig
from rewards.base import Source
from rewards.sources.world import world_progress, world_score, world_total, world_won
from rollout.tree import ROOT, Node
from rollout.types import StepFacts, StepKind, StopReason


def step(
    score: float | None = None, won: bool | None = None, ok: bool | None = True, progress: float | None = None
) -> Node:
    facts = StepFacts(kind=StepKind.call, tool="world", tool_ok=ok, score=score, won=won, progress=progress)
    return Node(parent=ROOT, action_ids=[1], action_logprobs=[-1.0], facts=facts, stop=StopReason.answered, version=0)


def test_a_step_is_paid_what_it_gained_and_an_episode_their_sum():
    steps = [step(0.25, False, progress=1.0), step(None, None, ok=None), step(0.5, True)]
    assert [world_score(each) for each in steps] == [0.25, None, 0.5]
    assert [world_progress(each) for each in steps] == [1.0, None, None]
    assert (world_total(steps), world_won(steps), world_won(steps[:1])) == (0.75, 1.0, 0.0)


def test_a_policy_that_never_reached_the_world_gets_nothing():
    silent = [step(ok=None)]
    assert (world_total(silent), world_won(silent)) == (0.0, 0.0)


def test_a_world_that_says_nothing_is_a_failed_score_and_not_a_zero():
    with pytest.raises(ValueError, match="keeps no score"):
        world_total([step()])
    with pytest.raises(ValueError, match="never says"):
        world_won([step(0.5)])


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("world_score", Level.step),
        ("world_progress", Level.step),
        ("world_total", Level.trajectory),
        ("world_won", Level.trajectory),
    ],
)
def test_each_is_a_source_of_its_level(name: str, level: Level):
    assert Source(name, SourceConfig(fn=f"rewards.sources.world:{name}")).level is level
