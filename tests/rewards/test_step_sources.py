"""The shipped step sources: format, tool success, and the rule judge of hop search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.drawn import answer_facts, call_facts, malformed_facts, parse_tree, row_of
from rewards.sources.calls import StateNovelty, new_observation, repeated_call
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


def test_a_reply_is_worth_less_the_more_steps_of_the_tree_heard_it():
    tree = parse_tree("q -> (a -> a1, b -> b1, c -> c1, d)")
    for name, said in {"a": "Tom", "b": "Tom", "c": "Mia"}.items():
        tree.nodes[row_of(tree, name)].observation_text = said
    novelty = StateNovelty()
    found = [novelty(tree.nodes[row_of(tree, name)], tree) for name in ("a", "b", "c", "d")]
    assert found == [pytest.approx(0.5**0.5), pytest.approx(0.5**0.5), 1.0, None]
    assert novelty(parse_tree("q -> a").nodes[0], tree) is None


def test_what_a_step_heard_is_counted_in_its_own_tree_and_as_that_tree_grows():
    novelty = StateNovelty()
    for number in (1, 2, 4):
        tree = parse_tree("q -> (" + ", ".join(f"s{place}" for place in range(number)) + ")")
        for node in tree.nodes:
            node.observation_text = "same"
        assert novelty(tree.nodes[0], tree) == pytest.approx(number**-0.5)
    tree.add(Node(parent=-1, action_ids=[], action_logprobs=[], facts=tree.nodes[0].facts, stop=StopReason.answered,
                  version=0, observation_text="same"))  # fmt: skip
    assert novelty(tree.nodes[0], tree) == pytest.approx(5**-0.5)


@given(st.lists(st.sampled_from(["", "x", "y", "z"]), min_size=1, max_size=12))
def test_the_squares_of_all_novelties_add_up_to_the_number_of_different_replies(replies):
    tree = parse_tree("q -> (" + ", ".join(f"s{place}" for place in range(len(replies))) + ")")
    for node, said in zip(tree.nodes, replies, strict=True):
        node.observation_text = said
    novelty = StateNovelty()
    total = sum((novelty(node, tree) or 0) ** 2 for node in tree.nodes)
    assert total == pytest.approx(len({said for said in replies if said}))
