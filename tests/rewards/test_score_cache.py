from __future__ import annotations

import asyncio
import math
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import JudgeServer

from conf.schema import Cache, RewardModelConfig, RewardsConfig, SourceConfig
from rewards.cache import ScoreCache
from rewards.drawn import parse_tree
from rewards.service import RewardService
from rewards.types import Score, ScoredTree
from rollout.tree import Tree

COUNTING = """
calls = 0
def reward(step):
    global calls
    calls += 1
    return float(calls)
"""
scores = st.one_of(
    st.builds(
        Score, st.floats(allow_nan=False, allow_infinity=False), parts=st.dictionaries(st.text(), st.floats(-1, 1))
    ),
    st.builds(Score.not_applicable, st.text()),
)


@given(st.dictionaries(st.text(min_size=1), st.lists(scores, max_size=3), max_size=4))
def test_what_is_found_is_what_was_kept(answers):
    cache = ScoreCache()
    cache.keep(answers)
    found = cache.found([*answers, "another"])
    cache.close()
    assert found.keys() == answers.keys()
    for name, said in answers.items():
        for one, other in zip(found[name], said, strict=True):
            assert (one.status, one.reason, dict(one.parts)) == (other.status, other.reason, dict(other.parts))
            assert one.value == other.value or (math.isnan(one.value) and math.isnan(other.value))


def test_broken_scores_are_never_kept():
    cache = ScoreCache()
    cache.keep({"a": [Score(1.0), Score.failed("down")], "b": [Score.timed_out("late")], "c": [Score(0.0)]})
    assert cache.found(["a", "b", "c"]) == {"c": [Score(0.0)]}
    cache.close()


def test_a_full_disk_costs_questions_and_no_scores(caplog: pytest.LogCaptureFixture):
    cache = ScoreCache()
    cache.keep({"early": [Score(1.0)]})
    pages = cache._file.execute("PRAGMA page_count").fetchone()[0]
    cache._file.execute(f"PRAGMA max_page_count={pages}")
    cache.keep({f"late {number}": [Score(1.0)] for number in range(1000)})
    assert "1000 scores could not be kept (database or disk is full)" in caplog.text
    assert cache.found(["early", "late 0", "late 999"]) == {"early": [Score(1.0)]}
    cache._file.execute("PRAGMA max_page_count=100000")
    cache.keep({"late 0": [Score(0.5)]})
    assert cache.found(["late 0"]) == {"late 0": [Score(0.5)]}
    cache.close()


def test_a_file_is_shared_and_outlives_whoever_wrote_it(tmp_path: Path):
    one, other = ScoreCache(tmp_path / "scores.sqlite"), ScoreCache(tmp_path / "scores.sqlite")
    one.keep({"a": [Score(0.5)]})
    assert other.found(["a"]) == {"a": [Score(0.5)]}
    one.close()
    other.close()
    later = ScoreCache(tmp_path / "scores.sqlite")
    assert later.found([str(number) for number in range(2000)] + ["a"]) == {"a": [Score(0.5)]}
    later.close()


def test_nothing_in_the_file_is_executed(tmp_path: Path):
    path = tmp_path / "scores.sqlite"
    ScoreCache(path).close()
    with sqlite3.connect(path) as file:
        assert file.execute("SELECT sql FROM sqlite_master").fetchall() == [
            ("CREATE TABLE scores (name TEXT PRIMARY KEY, said TEXT) WITHOUT ROWID",)
        ]  # names and JSON: no pickle
    file.close()


def scored(file: Path, *trees: Tree, cache_path: Path | None = None, cache: Cache = Cache.on) -> list[ScoredTree]:
    source = SourceConfig(fn=f"{file}:reward", cache=cache)

    async def together(service: RewardService) -> list[ScoredTree]:
        return await asyncio.gather(*map(service.score, trees))

    service = RewardService(RewardsConfig(sources={"mine": source}, num_processes=1), cache_path=cache_path)
    try:
        return asyncio.run(together(service))
    finally:
        service.close()


def said(tree: ScoredTree) -> dict[int, float]:
    return {row: score.value for row, score in tree.step_scores["mine"].items()}


def test_equal_steps_are_asked_about_once_in_a_tree_and_among_trees(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(COUNTING)
    first, second = scored(file, parse_tree("q -> a -> (b, b)"), parse_tree("q -> (a -> b, c)"))
    assert said(first)[1] == said(first)[2] == said(second)[1]
    # three different steps in all: a that goes on, b, c
    assert {*said(first).values(), *said(second).values()} == {1.0, 2.0, 3.0}
    costs = [each.costs["mine"] for each in (first, second)]
    assert sum(cost.calls - cost.cached_calls for cost in costs) == 3


def test_without_a_cache_every_step_is_asked_about(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(COUNTING)
    (tree,) = scored(file, parse_tree("q -> a -> (b, b)"), cache=Cache.auto)
    assert said(tree) == {0: 1.0, 1: 2.0, 2: 3.0}
    assert tree.costs["mine"].cached_calls == 0


def test_a_later_run_asks_nobody_until_the_reward_is_another(tmp_path: Path):
    file, path = tmp_path / "mine.py", tmp_path / "scores.sqlite"
    file.write_text(COUNTING)
    tree = parse_tree("q -> a -> (b, c)")
    (first,) = scored(file, tree, cache_path=path)
    (later,) = scored(file, tree, cache_path=path)
    assert said(later) == said(first)
    assert later.costs["mine"].cached_calls == later.costs["mine"].calls == 3
    assert later.origins == first.origins
    file.write_text(COUNTING.replace("float(calls)", "float(calls) + 10"))
    (changed,) = scored(file, tree, cache_path=path)
    assert set(said(changed).values()) == {11.0, 12.0, 13.0}
    assert changed.origins["mine"].version != first.origins["mine"].version


def judged(server: JudgeServer, path: Path, **changes: object) -> ScoredTree:
    cfg = RewardsConfig(
        sources={
            "judge": SourceConfig(fn="rewards.sources.judge:Verdict", model="judge", args=changes.pop("args", {}))
        },
        models={"judge": RewardModelConfig(path="judge", url=server.url, **changes)},
    )
    service = RewardService(cfg, cache_path=path)
    try:
        return asyncio.run(service.score(parse_tree("q -> a -> b")))
    finally:
        service.close()


def test_a_judge_is_asked_again_when_its_prompt_or_its_model_is_another(tmp_path: Path):
    path, prompt = tmp_path / "scores.sqlite", tmp_path / "prompt.jinja"
    prompt.write_text("Is {{ step }} right? {{ question }} {{ before }} {{ reference }} {{ form }}")
    with JudgeServer({"reasoning": "", "verdict": "right"}) as server:
        first = judged(server, path)
        asked = server.num_requests
        assert judged(server, path).origins == first.origins
        assert server.num_requests == asked  # the cache is on by itself where a model is asked
        judged(server, path, temperature=0.5)
        assert server.num_requests == 2 * asked
        other = judged(server, path, args={"prompt": str(prompt)})
        assert server.num_requests == 3 * asked
        assert other.origins["judge"].prompt_hash != first.origins["judge"].prompt_hash
        assert first.origins["judge"].model == other.origins["judge"].model != ""
