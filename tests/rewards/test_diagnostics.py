"""Lanser-CLI's reward from what a language tool reports."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import SourceConfig
from rewards.base import Source
from rewards.drawn import call_facts, parse_tree
from rollout.types import StepFacts


def reported(diagnostics: Any, safe: Any = True, confidence: Any = 1.0) -> StepFacts:
    return call_facts("edit", result=json.dumps({"diagnostics": diagnostics, "safe": safe, "confidence": confidence}))


def rewards(*facts: StepFacts, before: Any = None, **args: Any) -> list[float | str]:
    """Rewards of a chain, or the reason why there is none."""
    names = {f"s{place}": each for place, each in enumerate(facts)}
    data = {} if before is None else {"diagnostics_before": before}
    tree = parse_tree(" -> ".join(["q", *names, "end"]), facts=names, data={"question": "q", **data})
    source = Source("mended", SourceConfig(target="rewards.sources.diagnostics.Diagnostics", args=args))
    scores = [source.score_tree(tree)[row] for row in range(len(facts))]
    return [each.value if each.is_scored else each.reason or str(each.status) for each in scores]


def test_the_papers_examples_with_the_second_one_worked_out():
    # .5 * (5 - 2) + .4 - .1 * .06; then .5 * 0 + 0 - .1 * .38, where the paper prints -.438
    assert rewards(reported(2, True, 0.94), reported(2, False, 0.62), before=5) == pytest.approx([1.894, -0.038])


def test_differences_of_the_potential():
    # Phi: -.5 * 5 + .4 + .1 = -2; -1 + .4 + .094 = -.506; -1 + .062 = -.938
    found = rewards(reported(2, True, 0.94), reported(2, False, 0.62), before=5, potential=True)
    assert found == pytest.approx([1.494, -0.432])


def test_weights_and_names_of_entries_are_arguments():
    facts = call_facts("lint", result='{"errors": ["E1"], "ok": true, "sure": 0.5}')
    names = {"diagnostics_key": "errors", "safe_key": "ok", "confidence_key": "sure"}
    assert rewards(facts, before=["E1", "E2"], relief=1.0, safety=2.0, doubt=4.0, **names) == [1.0 + 2.0 - 2.0]


def test_a_start_can_be_a_whole_report():
    before = {"diagnostics": 1, "safe": False, "confidence": 0.5}
    # from -.5 + .05 to 0 + .4 + .1
    assert rewards(reported(0), before=before, potential=True) == pytest.approx([0.95])


def test_other_tools_in_between_change_nothing():
    found = rewards(reported(3), call_facts("list", result="a.py"), reported(1), before=3)
    assert found == pytest.approx([0.4, "not_applicable", 1.4]) or found == [0.4, "not_applicable", 1.4]


def test_without_a_start_the_first_report_is_where_counting_begins():
    assert rewards(reported(3), reported(1)) == ["not_applicable", 1.4]


def test_the_last_report_of_a_turn_with_several_calls_counts():
    turn = reported(9)
    turn.later_calls.append({"tool": "edit", "arguments": {}, "tool_ok": True, "result": reported(2).result})
    turn.later_calls.append({"tool": "list", "arguments": {}, "tool_ok": True, "result": "a.py"})
    assert rewards(turn, before=3) == [0.9]


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (reported(-1), '"diagnostics" is -1'),
        (reported("many"), "it must be a list of diagnostics or how many there are"),
        (reported(True), '"diagnostics" is True'),
        (reported(1, safe=None), '"safe" of the language tool is None; it must be true or false'),
        (reported(1, confidence=1.5), '"confidence" of the language tool is 1.5; it must be within'),
    ],
)
def test_a_report_that_cannot_be_read_is_a_failed_score(facts: StepFacts, told: str):
    (reason,) = rewards(facts, before=1)
    assert told in str(reason)


REPORTS = st.tuples(st.integers(0, 50), st.booleans(), st.floats(0, 1))


@given(st.lists(REPORTS, min_size=1, max_size=6), st.integers(0, 50))
def test_differences_add_up_to_the_way_from_first_to_last(reports, before):
    found = rewards(*(reported(*each) for each in reports), before=before, potential=True)
    diagnostics, safe, confidence = reports[-1]
    first, last = -0.5 * before + 0.4 + 0.1, -0.5 * diagnostics + 0.4 * safe + 0.1 * confidence
    assert sum(map(float, found)) == pytest.approx(last - first, abs=1e-9)
