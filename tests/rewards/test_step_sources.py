"""The shipped step sources: format, tool success, and the rule judge of hop search."""

from __future__ import annotations

import pytest

from rewards.drawn import answer_facts, call_facts, malformed_facts, parse_tree, row_of
from rewards.sources.calls import new_observation, repeated_call
from rewards.sources.format import format_ok, tool_success
from rewards.sources.hop_search import progress
from rollout.tree import Node, Tree
from rollout.types import StepFacts, StopReason

RELATIONS = ["teacher", "friend"]
PEOPLE = ["Anna Reed", "Tom Hill", "Mia Cole"]


def ask(relation: str, person: str, *, ok: bool = True):
    return call_facts("school" if ok else "office", ok=ok, relation=relation, person=person)


FACTS = {
    "right1": ask("teacher", "Anna Reed"),
    "right2": ask("friend", "Tom Hill"),
    "refused1": ask("teacher", "Anna Reed", ok=False),
    "detour": ask("boss", "Anna Reed"),
    "lost": ask("friend", "Nobody", ok=False),
    "mumble": malformed_facts(),
    "mia": answer_facts("mia cole"),
    "tom": answer_facts("Tom Hill"),
}


def judged(text: str) -> list[float]:
    tree: Tree = parse_tree(text, facts=FACTS, stops={"mumble": StopReason.malformed})
    path = [tree.nodes[row] for row in tree.path(len(tree.nodes) - 1)]
    return [progress(step, path[: place + 1], RELATIONS, PEOPLE, "Mia Cole") for place, step in enumerate(path)]


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("q -> right1 -> right2 -> mia", [1, 1, 1]),
        ("q -> refused1 -> right1", [0, 1]),
        ("q -> detour -> right1", [-0.5, 1]),
        ("q -> right1 -> right1 -> right2", [1, -0.5, 1]),  # the same hop again finds nothing new
        ("q -> right2", [-0.5]),  # the second hop before the first
        ("q -> refused1 -> right2", [0, -0.5]),  # a refused call leaves the chain where it was
        ("q -> right1 -> right2 -> right2 -> tom", [1, 1, -0.5, -0.5]),
        ("q -> lost -> mumble", [-0.5, -1]),
    ],
)
def test_progress_judges_each_step_by_where_the_chain_stands(text, scores):
    assert judged(text) == scores


def test_tool_success_has_nothing_to_say_of_a_step_without_a_call():
    tree = parse_tree("q -> (right1 -> mia, lost -> tom)", facts=FACTS)
    assert [tool_success(tree.nodes[row_of(tree, name)]) for name in ("right1", "lost", "mia")] == [1.0, 0.0, None]


def test_format_is_worthless_only_where_the_turn_cannot_be_read():
    tree = parse_tree("q -> lost -> (mia, mumble)", facts=FACTS, stops={"mumble": StopReason.malformed})
    assert [format_ok(node) for node in tree.nodes] == [1.0, 1.0, 0.0]


def along(text: str, facts: dict[str, StepFacts]) -> list[tuple[Node, list[Node]]]:
    tree = parse_tree(text, facts=facts)
    path = [tree.nodes[row] for row in tree.path(len(tree.nodes) - 1)]
    return [(step, path[: place + 1]) for place, step in enumerate(path)]


def test_a_call_in_the_same_words_is_a_repeat_refused_or_not():
    facts = {
        "first": call_facts("school", person="Anna"),
        "other": call_facts("office", person="Anna"),
        "again": call_facts("school", ok=False, person="Anna"),
        "mia": answer_facts("Mia"),
    }
    assert [repeated_call(*each) for each in along("q -> first -> other -> again -> mia", facts)] == [0, 0, 1, None]


def test_each_of_several_calls_in_a_turn_counts():
    both = call_facts("school", person="Anna")
    both.later_calls.append({"tool": "school", "arguments": {"person": "Anna"}, "tool_ok": True, "result": "Tom"})
    both.later_calls.append({"tool": "school", "arguments": {"person": "Tom"}, "tool_ok": True, "result": "Mia"})
    steps = along("q -> both -> mia", {"both": both, "mia": answer_facts("Mia")})
    assert repeated_call(*steps[0]) == pytest.approx(1 / 3)


def test_what_was_heard_before_is_not_new():
    steps = along("q -> a -> b -> c", {})
    for (step, _), said in zip(steps, ("Tom", "Tom", ""), strict=True):
        step.observation_text = said
    assert [new_observation(*each) for each in steps] == [1, 0, None]
