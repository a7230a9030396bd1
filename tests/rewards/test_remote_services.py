"""A user's own async function asks a model and the engines from the process it runs in, where there are no keys."""

from __future__ import annotations

import asyncio
from pathlib import Path

import judge_server
import pytest
from judge_server import JudgeServer

from conf.schema import Cache, RewardModelConfig, RewardsConfig, SourceConfig
from rewards.drawn import parse_tree
from rewards.service import RewardService
from rewards.types import Score, ScoredTree, ScoreStatus
from rollout.tree import Tree

pytestmark = pytest.mark.slow  # each starts a process

FILE = """
import os

async def asks(step, model):
    reply = await model.chat([{"role": "user", "content": step.action_text}], seed=1)
    assert "JUDGE_KEY" not in os.environ
    return float(reply.text)

async def asks_nothing_that_exists(step, model):
    return await model.sing()

async def goes_on(step, rows_of_interest, tree, engine):
    ends = await engine.complete(rows_of_interest, 2)
    graded = await engine.grade("answer", ends)
    return sum(score.value for score in graded.values()) / len(graded)

class Patient:
    def __init__(self):
        self.asked = 0
    async def __call__(self, steps, model):
        import asyncio
        replies = await asyncio.gather(*(model.chat([{"role": "user", "content": s.action_text}]) for s in steps))
        return [float(reply.text) for reply in replies]
"""


class Completions:
    async def complete(self, tree: Tree, row: int, num: int) -> Tree:
        return parse_tree(f"q -> {tree.nodes[row].action_text} -> ({', '.join(['yes', 'no'][:num])})", answer="yes")


def scored(tmp_path: Path, name: str, server: JudgeServer | None, **changes: object) -> ScoredTree:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    sources = {"mine": SourceConfig(fn=f"{file}:{name}", **({"model": "judge"} if server else {}), **changes)}
    sources["answer"] = SourceConfig(fn="rewards.sources.outcome:exact_match")
    models = {}
    if server:
        models["judge"] = RewardModelConfig(
            path="judge", url=server.url, api_key_env="JUDGE_KEY", timeout_s=5, max_retries=0
        )
    service = RewardService(RewardsConfig(sources=sources, models=models), completer=Completions())
    try:
        return asyncio.run(service.score(parse_tree("q -> 1 -> (2, 3)", answer="2")))
    finally:
        service.close()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("JUDGE_KEY", "k-123")
    return "k-123"


@pytest.mark.parametrize("name", ["asks", "Patient"])
def test_questions_go_through_the_service_which_has_the_key_and_counts(tmp_path, key, name):
    with JudgeServer(lambda messages: messages[-1]["content"], key=key) as server:
        found = scored(tmp_path, name, server)
    assert found.step_scores["mine"] == {0: Score(1.0), 1: Score(2.0), 2: Score(3.0)}
    assert found.costs["mine"].requests == 3
    assert found.costs["mine"].prompt_tokens > 0


def test_what_the_model_cannot_do_is_the_reason_of_the_failed_score(tmp_path, key):
    with JudgeServer("1", key=key) as server:
        found = scored(tmp_path, "asks_nothing_that_exists", server)
    assert {score.status for score in found.step_scores["mine"].values()} == {ScoreStatus.failed}
    assert "sing" in found.step_scores["mine"][0].reason


def test_a_model_that_never_answers_is_a_time_out_of_the_score_that_asked(tmp_path, key):
    with JudgeServer("1", key=key, always=judge_server.NEVER_ANSWERS) as server:
        found = scored(tmp_path, "asks", server, timeout_s=1.0)
    assert {score.status for score in found.step_scores["mine"].values()} == {ScoreStatus.timed_out}


def test_the_engines_go_on_from_a_step_and_another_source_grades_the_ends(tmp_path):
    found = scored(tmp_path, "goes_on", None, args={"rows_of_interest": 0})
    assert {score.value for score in found.step_scores["mine"].values()} == {0.5}  # "yes" is right, "no" is not
    assert found.costs["mine"].generated_tokens == 6  # three steps asked, each for two ends of one word


def test_what_a_grader_asks_its_model_is_a_cost_of_who_asked_the_grader(tmp_path, key):
    file = tmp_path / "mine.py"
    file.write_text(FILE + "\nasync def grades(trajectory, engine):\n    return len(await engine.grade('judged'))\n")
    with JudgeServer("1", key=key) as server:
        model = RewardModelConfig(path="judge", url=server.url, api_key_env="JUDGE_KEY")
        judged = SourceConfig(fn=f"{file}:asks", model="judge", cache=Cache.off)
        sources = {"grades": SourceConfig(fn=f"{file}:grades"), "judged": judged}
        service = RewardService(RewardsConfig(sources=sources, models={"judge": model}))
        try:
            found = asyncio.run(service.score(parse_tree("q -> 1 -> 2")))
        finally:
            service.close()
    assert found.leaf_scores["grades"] == {1: Score(2.0)}
    assert found.costs["grades"].requests == found.costs["judged"].requests == 2
    assert server.num_requests == 4
