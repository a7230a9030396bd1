from __future__ import annotations

import asyncio

import pytest

from conf.errors import ConfigError
from conf.schema import RewardsConfig, SourceConfig
from rewards.drawn import parse_tree
from rewards.models.base import ModelError
from rewards.service import RewardService
from rewards.types import ScoredTree, ScoreStatus
from rollout.tree import ROOT, Tree
from rollout.types import StopReason


class Completions:
    """Stands for the rollout workers: rows are continued to the answers it was given."""

    def __init__(self, answers: dict[int, list[str]], stops: dict[str, StopReason] | None = None) -> None:
        self.answers, self.stops, self.asked = answers, stops or {}, []

    async def complete(self, tree: Tree, row: int, num: int) -> Tree:
        self.asked.append((row, num))
        if row not in self.answers:
            raise ModelError("no rollout worker was left to go on with")
        path = " -> ".join(["q", *(tree.nodes[each].action_text for each in tree.path(row))])
        return parse_tree(f"{path} -> ({', '.join(self.answers[row])})", answer=tree.prompt.answer, stops=self.stops)


def values(completer: Completions, drawn: str = "q -> a -> (yes, no)", **args: object) -> tuple[dict, ScoredTree]:
    sources = {
        "answer": SourceConfig(fn="rewards.sources.outcome:exact_match"),
        "value": SourceConfig(
            fn="rewards.sources.rollouts:Value", signal="value", args={"grader": "answer", "num": 4, **args}
        ),
    }
    service = RewardService(RewardsConfig(sources=sources), completer=completer)
    try:
        scored = asyncio.run(service.score(parse_tree(drawn, answer="yes")))
    finally:
        service.close()
    return scored.step_scores["value"], scored


def test_the_value_of_a_step_is_the_share_of_rollouts_from_it_that_succeed():
    completer = Completions({ROOT: ["no", "no", "no", "yes"], 0: ["yes", "no", "yes", "yes"]})
    found, scored = values(completer)
    assert {row: score.value for row, score in found.items()} == {ROOT: 0.25, 0: 0.75, 1: 1.0, 2: 0.0}
    assert completer.asked == [(ROOT, 4), (0, 4)]  # the ends have outcomes of their own
    assert scored.step_signals["value"] == found
    assert scored.costs["value"].generated_tokens == 8  # four words behind the prompt, four behind "a"


def test_rollouts_that_the_world_cut_short_say_nothing():
    crashed = {"gone": StopReason.tool_crashed}
    found, _ = values(Completions({ROOT: ["no", "yes"], 0: ["yes", "gone", "gone", "no"]}, crashed))
    assert found[0].value == 0.5  # one right of the two that ended by themselves
    found, _ = values(Completions({ROOT: ["no", "yes"], 0: ["gone", "gone"]}, crashed))
    assert found[0].status is ScoreStatus.failed
    assert found[0].reason == "the world cut all 4 rollouts short"


def test_a_step_that_nobody_can_go_on_from_fails_alone():
    found, _ = values(Completions({ROOT: ["no"]}))
    assert found[0].status is ScoreStatus.failed
    assert found[0].reason == "no rollout worker was left to go on with"
    assert found[ROOT].value == 0.0


def test_an_outcome_that_was_not_scored_is_not_left_out_of_the_mean():
    sources = {
        "answer": SourceConfig(fn="rewards.sources.outcome:exact_match"),
        "value": SourceConfig(fn="rewards.sources.rollouts:Value", args={"grader": "answer"}),
    }
    service = RewardService(RewardsConfig(sources=sources), completer=Completions({ROOT: ["b"], 0: ["b"]}))
    scored = asyncio.run(service.score(parse_tree("q -> a -> b")))  # there is no reference answer to compare with
    service.close()
    assert {score.status for score in scored.step_scores["value"].values()} == {ScoreStatus.failed}


def test_without_engines_every_step_that_goes_on_fails_and_says_why():
    sources = {
        "answer": SourceConfig(fn="rewards.sources.outcome:exact_match"),
        "value": SourceConfig(fn="rewards.sources.rollouts:Value", args={"grader": "answer"}),
    }
    service = RewardService(RewardsConfig(sources=sources))
    scored = asyncio.run(service.score(parse_tree("q -> a -> b", answer="b")))
    service.close()
    assert scored.step_scores["value"][0].reason.startswith("there are no engines here")
    assert scored.step_scores["value"][1].value == 1.0


def test_a_number_of_rollouts_that_measures_nothing_is_refused():
    with pytest.raises(ConfigError, match="num=0 rollouts measure nothing"):
        values(Completions({}), num=0)
