from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from conf.errors import DataError
from rewards.drawn import parse_scored, parse_tree
from rewards.types import Score, ScoredTree
from rl.outcomes import (
    PromptOutcome,
    Sample,
    prompt_outcomes,
    read_outcomes,
    shared_prompts,
    successes_of,
    write_outcomes,
)
from rollout.types import StopReason


def two_samples(**changes) -> ScoredTree:
    tree = parse_tree("q -> (a -> a1, b)", prompt_id="eval/3", answer="a1", **changes)
    steps = {0: Score(0.5), 1: Score(0.25), 2: Score.not_applicable()}
    outcome = {leaf: Score(float(leaf == 1)) for leaf in tree.trained_leaves()}
    return ScoredTree(tree=tree, step_scores={"prm": steps}, leaf_scores={"answer": outcome})


def test_each_trajectory_of_a_prompt_is_a_sample():
    [row] = prompt_outcomes([two_samples()])
    assert (row.prompt, row.reference, row.success_share) == ("eval/3", "a1", 0.5)
    right, wrong = row.samples
    assert (right.success, right.answer, right.tokens, right.turns, right.stop) == (True, "a1", 2, 2, "answered")
    assert right.scores == {"answer": 1.0} and right.step_scores == {"prm": [0.5, 0.25]}
    assert wrong.success is False and wrong.step_scores == {"prm": []}  # nothing to say of its only step


def test_a_world_that_failed_is_no_failure_of_the_policy():
    [row] = prompt_outcomes([two_samples(stops={"b": StopReason.tool_crashed})])
    assert [sample.success for sample in row.samples] == [True, None]
    assert row.samples[1].unknown == "tool_crashed" and row.success_share == 1.0 and len(row.known) == 1


@pytest.mark.parametrize(
    ("score", "why"), [(Score.failed("boom"), "failed: boom"), (Score.timed_out("late"), "timed_out: late")]
)
def test_a_score_that_failed_says_why_and_is_no_zero(score: Score, why: str):
    scored = two_samples()
    scored.leaf_scores["answer"][2] = score
    sample = prompt_outcomes([scored])[0].samples[1]
    assert (sample.success, sample.unknown, sample.scores) == (None, why, {"answer": None})
    assert successes_of(scored) == [True]


def test_a_prompt_of_which_nothing_is_known_has_no_share():
    assert math.isnan(PromptOutcome(prompt="eval/0", reference="", samples=[Sample(success=None)]).success_share)


def test_rows_come_back_equal(tmp_path: Path):
    rows = prompt_outcomes([two_samples(), parse_scored("q -> a", outcomes={"a": 1.0})])
    file = tmp_path / "eval" / "step_000010.jsonl"
    write_outcomes(file, rows)
    assert read_outcomes(file) == rows
    assert json.loads(file.read_text().splitlines()[0])["samples"][0]["success"] is True
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_damaged_row_is_named(tmp_path: Path):
    file = tmp_path / "step_000010.jsonl"
    write_outcomes(file, prompt_outcomes([two_samples()]))
    file.write_text(file.read_text() + '{"prompt": "eval/4"}\n')
    with pytest.raises(DataError, match=r"step_000010\.jsonl line 2 is no row of an evaluation"):
        read_outcomes(file)


def outcome(prompt: str, *successes: bool | None) -> PromptOutcome:
    return PromptOutcome(prompt=prompt, reference="", samples=[Sample(success=each) for each in successes])


def test_runs_are_compared_on_the_prompts_that_both_know_something_of():
    one = [outcome("eval/0", True, False), outcome("eval/1", None, None), outcome("eval/2", True, True)]
    other = [outcome("eval/2", False, False), outcome("eval/1", True, True), outcome("eval/0", True, None)]
    assert shared_prompts([one, other]) == [[0.5, 1.0], [1.0, 0.0]]
    assert shared_prompts([]) == []
