from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conf.errors import ConfigError
from conf.schema import RewardModelConfig, RewardsConfig, SourceConfig
from rewards.drawn import parse_tree, row_of
from rewards.models.base import MarkedText, Message, ModelError, Reply
from rewards.service import RewardService
from rewards.sources.prm import AGGREGATES, Aggregate, Generative, StepScores, aggregate, step_text
from rewards.types import Score
from rollout.tree import Tree

FORK = "q -> a -> (b -> b1, c)"
SCORES = {"a": 0.9, "b": 0.4, "b1": 0.2, "c": 0.7}


@dataclass
class FakeModel:
    """Scores a step by its text, and remembers what it was asked."""

    scores: Mapping[str, float] = field(default_factory=lambda: SCORES)
    unreadable: str = ""
    error: Exception = field(default_factory=lambda: ModelError("too long"))
    logprobs: tuple[float, float] = (-0.105, -2.4)
    texts: list[MarkedText] = field(default_factory=list)
    asked: list[list[Message]] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    identity: str = "fake"

    async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
        self.texts += texts
        if any(self.unreadable in text.steps for text in texts):
            raise self.error
        return [[self.scores[step] for step in text.steps] for text in texts]

    async def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        self.asked.append(list(messages))
        if self.unreadable and self.unreadable in messages[0]["content"]:
            raise self.error
        return dict(zip(choices, self.logprobs, strict=True))

    async def chat(self, messages: Sequence[Message], **options: Any) -> Reply:
        self.seeds.append(options["seed"])
        return Reply(text=f"<think>hm</think>\ncheck {len(self.seeds)}")


def asked_rows(tree: Tree) -> list[int]:
    return sorted({row for leaf in tree.trained_leaves() for row in tree.path(leaf)})


def scored(source: Any, tree: Tree, model: FakeModel) -> dict[str, float | Score]:
    rows = asked_rows(tree)
    steps = [tree.nodes[row] for row in rows]
    scores = asyncio.run(source(tree=tree, rows=rows, steps=steps, question=tree.prompt.question, model=model))
    return {step.action_text: score for step, score in zip(steps, scores, strict=True)}


def test_each_step_has_the_models_score_and_each_trajectory_is_read_once():
    model = FakeModel()
    assert scored(StepScores(), parse_tree(FORK), model) == SCORES
    assert [text.steps for text in model.texts] == [("a", "b", "b1"), ("a", "c")]  # not one input per step
    assert {text.question for text in model.texts} == {"q"}


def test_a_step_of_several_trajectories_has_the_score_of_the_first():
    class Forgetful(FakeModel):
        async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
            self.texts += texts
            return [[len(self.texts) / 10] * len(text.steps) for text in texts]

    assert scored(StepScores(), parse_tree(FORK), Forgetful()) == {"a": 0.1, "b": 0.1, "b1": 0.1, "c": 0.2}


def test_the_service_asks_the_model_that_the_source_names():
    sources = {
        "steps": SourceConfig(fn="rewards.sources.prm:StepScores", model="prm"),
        "lowest": SourceConfig(fn="rewards.sources.prm:Aggregate", model="prm", args={"how": "last"}),
        "asked": SourceConfig(fn="rewards.sources.prm:Generative", model="prm", weight=0.0),
    }
    model = FakeModel()
    cfg = RewardsConfig(sources=sources, models={"prm": RewardModelConfig()})
    service = RewardService(cfg, models={"prm": model})
    tree = parse_tree(FORK)
    found = asyncio.run(service.score(tree))
    service.close()
    assert {row: score.value for row, score in found.step_signals["step"].items()} == {
        row_of(tree, name): value for name, value in SCORES.items()
    }
    assert {row: score.value for row, score in found.leaf_signals["outcome"].items()} == {
        row_of(tree, "b1"): 0.2,
        row_of(tree, "c"): 0.7,
    }
    assert found.step_scores["asked"][0].value == pytest.approx(0.908462, abs=1e-6)
    assert found.costs["steps"].requests == 2, "one for each trajectory"


def test_pruned_trajectories_are_not_read():
    model = FakeModel()
    assert scored(StepScores(), parse_tree(FORK, pruned=["b1"]), model) == {"a": 0.9, "c": 0.7}
    assert len(model.texts) == 1


def test_a_step_is_what_the_policy_said_and_then_what_came_back():
    tree = parse_tree("q -> a -> b")
    tree.nodes[0].observation_text = "found"
    assert [step_text(node) for node in tree.nodes] == ["a\nfound", "b"]


def test_logits_spread_what_a_sure_model_says():
    model = FakeModel({"a": 0.5, "b": 0.25, "b1": 1.0, "c": 0.0})
    scores = scored(StepScores(logit=True), parse_tree(FORK), model)
    assert (scores["a"], scores["b"]) == (0.0, pytest.approx(-math.log(3)))
    assert (scores["b1"], scores["c"]) == (pytest.approx(13.8155, abs=1e-3), pytest.approx(-13.8155, abs=1e-3))


def test_a_trajectory_that_cannot_be_read_fails_its_own_steps_alone():
    scores = scored(StepScores(), parse_tree(FORK), FakeModel(unreadable="b1"))
    assert (scores["a"], scores["c"]) == (0.9, 0.7), "the other trajectory tells of the shared step"
    failed = scores["b"]
    assert isinstance(failed, Score) and failed.status == "failed" and failed.reason == "too long"


def test_a_late_model_is_timed_out_and_not_zero():
    scores = scored(StepScores(), parse_tree("q -> a -> b1"), FakeModel(unreadable="b1", error=TimeoutError("60 s")))
    assert all(isinstance(score, Score) and score.status == "timed_out" for score in scores.values())


def test_a_model_that_loses_a_step_fails():
    class Short(FakeModel):
        async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
            return [[0.5] for _ in texts]

    failed = scored(StepScores(), parse_tree("q -> a -> b"), Short())["a"]
    assert isinstance(failed, Score) and failed.reason == "the model gave 1 scores for 2 steps"


@pytest.mark.parametrize(
    "how, expected", [("min", 0.2), ("product", 0.072), ("mean", 0.5), ("last", 0.2), ("sum", 1.5)]
)
def test_scores_of_steps_make_one_of_the_trajectory(how: str, expected: float):
    assert aggregate([0.9, 0.4, 0.2], how) == pytest.approx(expected)
    tree = parse_tree("q -> a -> b -> b1")
    found = asyncio.run(Aggregate(how)(trajectory=tree.nodes, question="q", model=FakeModel()))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("how", AGGREGATES)
def test_no_steps_are_no_score(how: str):
    assert aggregate([], how) is None


def test_the_smallest_is_the_default_and_an_impossible_step_makes_the_product_zero():
    tree = parse_tree("q -> a -> b")
    assert asyncio.run(Aggregate()(trajectory=tree.nodes, question="q", model=FakeModel())) == 0.4
    assert aggregate([0.9, 0.0], "product") == 0.0
    assert aggregate([1e-200, 1e-200], "product") == 0.0


def test_an_unknown_aggregate_is_refused():
    with pytest.raises(ConfigError, match=r'how="max" is no way to aggregate. Use one of min, mean'):
        Aggregate("max")


def test_a_generative_model_is_asked_about_each_step_with_those_before_it():
    model = FakeModel()
    scores = scored(Generative(), parse_tree(FORK), model)
    # e^-.105 / (e^-.105 + e^-2.4)
    assert scores == {name: pytest.approx(0.908462, abs=1e-6) for name in SCORES}
    contents = [messages[0]["content"] for messages in model.asked]
    assert ['number="3"' in each for each in contents].count(True) == 1
    assert all("Answer with one word: Yes or No." in each and "<problem>\nq\n</problem>" in each for each in contents)


def test_written_checks_are_averaged_and_each_has_its_seed():
    class Changing(FakeModel):
        async def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
            self.asked.append(list(messages))
            share = {"check 1": 0.9, "check 2": 0.2, "check 3": 0.7}[messages[1]["content"]]
            return {choices[0]: math.log(share), choices[1]: math.log(1 - share)}

    model = Changing()
    scores = scored(Generative(reason=True, num_chains=3), parse_tree("q -> a"), model)
    assert scores["a"] == pytest.approx(0.6)  # (.9 + .2 + .7) / 3
    assert len(set(model.seeds)) == 3
    first = model.asked[0]
    assert [message["role"] for message in first] == ["user", "assistant", "user"]
    assert "You are asked for your verdict afterwards." in first[0]["content"]
    assert first[2]["content"] == "So is step 1 correct? Answer with one word: Yes or No."


def test_chains_without_a_check_would_be_the_same():
    with pytest.raises(ConfigError, match="num_chains=3 with reason=False"):
        Generative(num_chains=3)


def test_one_question_that_fails_leaves_the_others_their_scores():
    scores = scored(Generative(), parse_tree("q -> a -> b"), FakeModel(unreadable='number="2"'))
    assert isinstance(scores["a"], float)
    assert isinstance(scores["b"], Score) and scores["b"].status == "failed"


def test_the_prompt_can_be_ones_own(tmp_path: Path):
    (tmp_path / "mine.jinja").write_text("{{ question }}: {{ steps | join(', ') }}? {{ yes }}/{{ no }}")
    model = FakeModel()
    source = Generative(prompt=str(tmp_path / "mine.jinja"), yes="+", no="-")
    scored(source, parse_tree("q -> a -> b"), model)
    assert model.asked == [[{"role": "user", "content": "q: a? +/-"}], [{"role": "user", "content": "q: a, b? +/-"}]]
    assert source.prompt_hash != Generative().prompt_hash
    with pytest.raises(ConfigError, match=r'gone.jinja" is no file'):
        Generative(prompt=str(tmp_path / "gone.jinja"))
