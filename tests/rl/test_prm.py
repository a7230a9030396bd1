"""A process reward model of the run's own in the loop: when it scores, when it learns, and from what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from conf.checks import problems
from conf.compose import compose
from conf.schema import Config
from rewards.blend import blend
from rewards.drawn import parse_scored
from rewards.types import Score, ScoredTree, ScoreStatus
from rl.launch import Parts, Scoring
from rl.policy.prm_actor import PrmHandle
from rl.progress import Progress
from rl.run import Run
from rl.run_folder import open_run_folder, settings
from rl.tracker import Tracker
from rollout.data import PromptSource
from rollout.pool import RolloutPool
from rollout.tree import Tree
from rollout.types import Prompt

OVERRIDES = [
    *("experiment=hop_search_prime", "select=none", "rollout.prompts_per_step=2", "tracker=disabled"),
    *("~rewards.sources.progress", "~rewards.sources.tool_success"),
]


class World:
    """Prompts, pool and scoring in one: two answers each, of which the first is right."""

    num_restarts = 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def draw(self, first: int, num: int) -> list[Prompt]:
        return [Prompt(id=str(place), token_ids=(1,), question="q", answer="") for place in range(first, first + num)]

    def grow(self, prompts: list[Prompt], seed: int) -> Iterator[tuple[int, Tree]]:
        return ((index, self._scored(prompt.id).tree) for index, prompt in enumerate(prompts))

    def actors(self) -> list[Any]:
        return []

    def submit(self, trees: Iterator[tuple[int, Tree]]) -> dict[int, Tree]:
        return dict(trees)

    def collect(self, calls: dict[int, Tree]) -> list[ScoredTree]:
        return [self._scored(tree.prompt.id) for tree in calls.values()]

    def _scored(self, prompt_id: str) -> ScoredTree:
        scored = parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0}, prompt_id=prompt_id)
        scored.leaf_scores = {"answer": scored.leaf_scores["outcome"]}
        service = compose([*OVERRIDES, "prm=none", "credit=grpo"]).rewards
        return blend(scored, service)


class Prm:
    """Says of every step how often it has learnt; notes what it was asked."""

    def __init__(self, says: float | None = None) -> None:
        self.log: list[Any] = []
        self.updates, self.says = 0, says

    def actors(self) -> list[Any]:
        return []

    def score(self, trees: Sequence[Tree]) -> Any:
        self.log.append(("score", [tree.prompt.id for tree in trees]))
        value = float(self.updates) if self.says is None else self.says
        return [dict.fromkeys(range(len(tree.nodes)), value) for tree in trees]

    def update(self, trees: Sequence[Tree], outcomes: Sequence[dict[int, float]], step: int) -> Any:
        self.log.append(("update", [tree.prompt.id for tree in trees], list(outcomes), step))
        self.updates += 1
        return {"prm/loss": 0.5}

    def answer(self, call: Any, what: str, limit_s: float | None = None) -> Any:
        return call


def opened(folder: Path, prm: Prm, *overrides: str) -> Run:
    cfg = compose([*OVERRIDES, *overrides])
    world = World(cfg)
    parts = Parts(cast(RolloutPool, world), cast(Scoring, world), None, None, cast(PrmHandle, prm))
    run_folder = open_run_folder(folder / "run", settings(cfg))
    tracker = Tracker(cfg.tracker, run_folder.path, "prm", settings(cfg))
    run = Run(cfg, run_folder, cast(PromptSource, world), parts, Progress(cfg), tracker)
    run.restore()
    return run


def signals(scored: Sequence[ScoredTree]) -> set[float]:
    return {score.value for each in scored for score in each.step_signals["implicit"].values()}


def test_its_scores_join_the_others_and_are_blended_under_their_own_signal(tmp_path: Path):
    prm = Prm(says=0.25)
    run = opened(tmp_path, prm, "rewards.sources.implicit.weight=2")
    scored = run.score(run.grow(run.next_prompts()))
    assert prm.log == [("score", ["0", "1"])]  # it learns later, from what selection left
    for each in scored:
        assert each.step_scores["implicit"] == {0: Score(0.25), 1: Score(0.25)}
        assert each.step_signals == {"implicit": {0: Score(0.5), 1: Score(0.5)}}
        assert set(each.leaf_signals) == {"outcome"}
        assert each.origins["implicit"].source == "prm.kind=implicit"


def test_it_may_learn_from_a_batch_before_it_scores_it(tmp_path: Path):
    prm = Prm()
    run = opened(tmp_path, prm, "prm.order=update_then_score")
    scored = run.score(run.grow(run.next_prompts()))
    assert prm.log == [("update", ["0", "1"], [{0: 1.0, 1: 0.0}] * 2, 0), ("score", ["0", "1"])]
    assert signals(scored) == {1.0}


def test_a_batch_that_is_refilled_is_scored_once(tmp_path: Path):
    prm = Prm()
    run = opened(tmp_path, prm)
    run.score(run.grow(run.next_prompts()))
    scored = run.score(run.grow(run._draw(1)))
    assert prm.log == [("score", ["0", "1"]), ("score", ["2"])]
    assert [each.tree.prompt.id for each in scored] == ["0", "1", "2"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverged_fails_its_scores_and_trains_nothing(tmp_path: Path, value: float):
    run = opened(tmp_path, Prm(says=value))
    (first, _) = run.score(run.grow(run.next_prompts()))
    assert first.step_signals["implicit"][0].status is ScoreStatus.failed
    assert f"the process reward model says {value}: it diverged" in first.step_scores["implicit"][0].reason


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prm.kind=none"], "rewards.sources.implicit.prm=true, but prm.kind=none: there is no model to score"),
        (["~rewards.sources.implicit", "credit=grpo"], "prm.kind=implicit, and 0 sources carry its scores (none)"),
        (
            ["rewards.sources.more={prm: true, signal: more}"],
            "prm.kind=implicit, and 2 sources carry its scores (rewards.sources.implicit, rewards.sources.more)",
        ),
        (["rewards.sources.implicit.fn=a.py:b"], "prm=true, and it names a function or a model too: which scores?"),
    ],
)
def test_a_model_and_its_source_come_together(overrides: list[str], message: str):
    found = [each.text for each in problems(compose([*OVERRIDES, *overrides])) if each.fatal]
    assert any(message in text for text in found), found


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=hop_search_prime"],
        ["experiment=hop_search_ppr", "rewards.models.judge.url=http://127.0.0.1:1/v1"],
        ["experiment=hop_search_ppo", "credit=spa_rl", "prm=progress"],
    ],
)
def test_shipped_experiments_can_run(overrides: list[str]):
    cfg = compose(overrides)
    assert [each.text for each in problems(cfg) if each.fatal] == []


def test_a_judge_without_an_address_is_refused_before_anything_starts():
    (found,) = [each.text for each in problems(compose(["experiment=hop_search_ppr"])) if each.fatal]
    assert found == 'rewards.models.judge.url="" is no address. Give the base address, as https://host/v1.'
