from __future__ import annotations

import asyncio

from conf.schema import SourceConfig
from rewards.base import Source
from rewards.drawn import parse_tree, row_of
from rewards.judging import SourceJudge, paths_to
from rewards.types import Score
from rollout.tree import Tree
from rollout.types import StopReason


def rows(tree: Tree, *names: str) -> list[int]:
    return [row_of(tree, name) for name in names]


def test_open_steps_are_asked_about_as_if_they_were_the_last():
    tree = parse_tree("q -> (a -> (a1 -> x, a2), b -> y)", observation_tokens=1)
    del tree.nodes[row_of(tree, "x")], tree.nodes[row_of(tree, "y")]
    for row in rows(tree, "a1", "b"):
        assert tree.nodes[row].stop is StopReason.continues
    found, new = paths_to(tree, rows(tree, "a1", "a2"))
    assert [node.action_text for node in found.nodes] == ["a", "a1", "a2"]
    assert found.trained_leaves() == [new[row] for row in rows(tree, "a1", "a2")]
    assert found.nodes[1].observation_ids == [] and tree.nodes[row_of(tree, "a1")].observation_ids


def test_a_source_says_what_its_steps_are_worth():
    asked: list[list[str]] = []

    async def grade(source: str, tree: Tree) -> dict[int, Score]:
        asked.append([node.action_text for node in tree.nodes])
        assert source == "progress"
        known = {"a": Score(0.5), "b": Score.failed("no answer"), "c": Score.not_applicable()}
        return {row: known[node.action_text] for row, node in enumerate(tree.nodes) if node.action_text in known}

    tree = parse_tree("q -> (a, b, c, d, e)", stops={"a": StopReason.not_chosen, "d": StopReason.tool_crashed})
    judge = SourceJudge(grade, "progress")
    said = asyncio.run(judge.score(tree, rows(tree, "c", "a", "b", "d")))
    assert said == [None, 0.5, None, None]
    assert asked == [["a", "b", "c", "d"]]


def test_a_configured_source_can_judge():
    source = Source("format", SourceConfig(fn="rewards.sources.format:format_ok"))

    async def grade(name: str, tree: Tree) -> dict[int, Score]:
        calls = source.calls(tree)
        return source.folded(tree, calls, await source.answers(tree, calls, {}))

    tree = parse_tree("q -> (a -> x, b)", stops={"b": StopReason.malformed})
    del tree.nodes[row_of(tree, "x")]
    assert asyncio.run(SourceJudge(grade, "format").score(tree, rows(tree, "a", "b"))) == [1.0, 0.0]


def test_the_score_at_the_choice_can_be_taught():
    source = Source("judged", SourceConfig(fn="rewards.sources.judged:judged", level="step"))
    tree = parse_tree("q -> (a, b)", stops={"b": StopReason.not_chosen})
    tree.nodes[0].judged = 0.25
    found = source.score_tree(tree)
    assert found[0] == Score(0.25) and not found[1].is_scored
