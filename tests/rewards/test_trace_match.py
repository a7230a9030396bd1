"""A step's calls against a reference trace: MatchTIR's step reward on a tree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import SourceConfig
from rewards.base import Source
from rewards.drawn import answer_facts, call_facts, malformed_facts, parse_tree, row_of
from rewards.sources.trace_match import Match
from rewards.types import Score
from rollout.tree import Tree
from rollout.types import StepFacts

TRACE = [
    {"tool": "search", "arguments": {"query": "x", "limit": 3}},
    {"tool": "open", "arguments": {"page": 7}},
]
FACTS = {
    "exact": call_facts("search", query="x", limit=3),  # (1 + 2/2 + 2) / 4 = 1
    "half": call_facts("search", query="x"),  # (1 + 1/2 + 1) / 4 = 0.625
    "other": call_facts("look", query="x", limit=3),  # another tool: 0
    "open": call_facts("open", page=7),
    "paris": answer_facts("Paris in France"),
    "none": malformed_facts(),
}


def scores(text: str, facts: dict[str, StepFacts] = FACTS, answer: str = "Paris", **args: object) -> dict[str, Score]:
    tree: Tree = parse_tree(text, facts=facts, data={"trace": TRACE}, answer=answer)
    found = Source("match", SourceConfig(target="rewards.sources.trace_match.Match", args=args)).score_tree(tree)
    return {tree.nodes[row].action_text: score for row, score in found.items()}


def values(text: str, **args: object) -> dict[str, float | None]:
    return {name: each.value if each.is_scored else None for name, each in scores(text, **args).items()}


def test_each_call_is_worth_its_similarity_and_an_answer_its_words():
    # the words are "paris in france" and "paris": 2 * 1 / (3 + 1)
    assert values("q -> half -> other -> open -> paris") == {"half": 0.625, "other": 0, "open": 1, "paris": 0.5}


def test_a_reference_call_is_matched_once():
    assert values("q -> exact -> half -> open") == {"exact": 1, "half": 0, "open": 1}


def test_a_step_is_matched_by_what_was_done_so_far_and_not_by_what_follows():
    # over the whole chain `exact` would take the reference from `half`, but `half` was made before it
    assert values("q -> half -> exact")["half"] == 0.625
    shared = values("q -> half -> (exact -> paris, open)")
    assert shared == {"half": 0.625, "exact": 1, "open": 1, "paris": 0.5}


def test_a_step_of_several_calls_is_worth_their_mean():
    both = call_facts("search", query="x", limit=3)
    both.later_calls.append({"tool": "look", "arguments": {}, "tool_ok": True, "result": ""})
    assert scores("q -> both -> paris", facts={**FACTS, "both": both})["both"].value == 0.5


def test_a_step_without_a_call_or_an_answer_and_an_answer_without_a_reference_are_not_judged():
    assert values("q -> none -> paris")["none"] is None
    assert values("q -> open -> paris", answer="")["paris"] is None


def test_every_method_shares_two_reference_calls_among_two_calls():
    trace = [{"tool": "f", "arguments": {"a": 1, "b": 2}}, {"tool": "f", "arguments": {"a": 1}}]
    tree = parse_tree("q -> one -> two", facts={"one": call_facts("f", a=1, b=2), "two": call_facts("f", a=1, c=3)})
    path = [tree.nodes[row_of(tree, name)] for name in ("one", "two")]
    # of the second call, {a, c}: to {a, b} (1 + 1/3 + 1)/4, to {a} (1 + 1/2 + 1)/3, which the first call leaves to it
    for method in ("assigned", "greedy"):
        assert Match(method)(path[1], path, trace, "") == pytest.approx(2.5 / 3)
    # alone, the call's mass is shared by an exact reference call and one that is only like it
    assert 0 < Match("transported")(path[0], path[:1], trace, "") < 1


def test_an_unknown_method_is_named_and_a_trace_of_another_form_is_a_failed_score():
    with pytest.raises(ValueError, match=r'method="best" is no matching of calls\. Use assigned, greedy, transported'):
        Match("best")
    tree = parse_tree("q -> open", facts=FACTS)
    for trace in (["open"], [{"name": "open"}], [{"tool": "open", "arguments": [7]}]):
        with pytest.raises(ValueError, match="trace"):
            Match()(tree.nodes[0], tree.nodes, trace, "")


CALLS = st.lists(
    st.tuples(st.sampled_from(["f", "g"]), st.dictionaries(st.sampled_from("ab"), st.integers(0, 1))), max_size=4
)


@settings(max_examples=40, deadline=None)
@given(CALLS, CALLS.filter(bool), st.sampled_from(["assigned", "greedy", "transported"]))
def test_a_step_earns_no_less_than_nothing_and_no_more_than_an_exact_match(wanted, made, method):
    facts = {f"s{place}": call_facts(tool, **arguments) for place, (tool, arguments) in enumerate(made)}
    tree = parse_tree(" -> ".join(["q", *facts, "end"]), facts=facts)
    trace = [{"tool": tool, "arguments": arguments} for tool, arguments in wanted]
    for row in range(len(made)):
        assert -1e-9 <= Match(method)(tree.nodes[row], tree.nodes[: row + 1], trace, "") <= 1 + 1e-9


@given(CALLS.filter(bool))
def test_making_the_reference_calls_earns_everything(calls):
    facts = {f"s{place}": call_facts(tool, **arguments) for place, (tool, arguments) in enumerate(calls)}
    tree = parse_tree(" -> ".join(["q", *facts, "end"]), facts=facts)
    trace = [{"tool": tool, "arguments": arguments} for tool, arguments in calls]
    for row in range(len(calls)):
        assert Match()(tree.nodes[row], tree.nodes[: row + 1], trace, "") == 1
