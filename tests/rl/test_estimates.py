from __future__ import annotations

import math

import pytest

from conf.errors import RewardFailed
from conf.schema import StepFold
from rl.estimates import chosen_by, default_ks, evaluation_of, folded, numeric_key, text_key
from rl.metrics import declared
from rl.outcomes import PromptOutcome, Sample


def sample(success: bool | None, answer: str | None = None, score: float | None = None, **more) -> Sample:
    return Sample(success=success, answer=answer, scores={"prm": score}, tokens=10, **more)


def prompt(*samples: Sample, name: str = "eval/0") -> PromptOutcome:
    return PromptOutcome(prompt=name, reference="", samples=list(samples))


RIGHT, WRONG, UNKNOWN = Sample(success=True), Sample(success=False), Sample(success=None, unknown="tool_crashed")
BY_PRM = chosen_by("prm", StepFold.min)


def test_success_is_the_mean_of_the_prompts_shares():
    found = evaluation_of([prompt(RIGHT, WRONG, WRONG, WRONG), prompt(RIGHT, RIGHT, RIGHT, WRONG)], ks=[1, 2, 4])
    assert found.success_share == 0.5
    values = {name: each.value for name, each in found.estimates.items()}
    # of 4 with 1 right, 2 drawn: 3 of 6 pairs hold it, none holds two; with 3 right: all 6 hold one, 3 hold two
    assert values["pass_at_2"] == pytest.approx((3 / 6 + 6 / 6) / 2) and values["pass_all_2"] == pytest.approx(3 / 12)
    assert values["pass_at_4"] == 1.0 and values["pass_all_4"] == 0.0
    assert "majority" not in values and "best_of_2" not in values  # nobody answered, nobody scored


def test_one_sample_each_is_a_plain_share_with_wilsons_interval():
    found = evaluation_of([prompt(RIGHT)] * 21 + [prompt(WRONG)] * 29)
    success = found.estimates["success"]
    assert success.value == pytest.approx(0.42) and list(found.estimates) == ["success"]
    assert (round(success.interval.low, 4), round(success.interval.high, 4)) == (0.2938, 0.5577)
    assert found.standard_error == pytest.approx(math.sqrt(0.42 * 0.58 / 49)) and found.spread is None


def test_an_outcome_nobody_knows_is_neither_success_nor_failure():
    found = evaluation_of([prompt(RIGHT, UNKNOWN), prompt(UNKNOWN, UNKNOWN), prompt(WRONG, RIGHT)], ks=[1, 2])
    assert found.success_share == 0.75 and found.num_prompts == 2
    assert found.unknown == {"tool_crashed": 3} and found.unknown_share == 0.5
    assert found.estimates["pass_at_2"].num_prompts == 1  # only one prompt has two samples that are known


def test_an_evaluation_without_one_known_outcome_is_an_error_and_not_zero():
    with pytest.raises(RewardFailed, match=r"success is unknown, not 0. Reasons: tool_crashed \(2\)"):
        evaluation_of([prompt(UNKNOWN), prompt(UNKNOWN)])


def test_majority_best_and_weighted_vote_of_one_prompt():
    scores = zip((7, 7, 9, 9, 9), (0.9, 0.8, 0.3, 0.2, 0.4), strict=True)
    row = prompt(*(sample(answer == 7, str(answer), score) for answer, score in scores))
    found = evaluation_of([row], ks=[1, 2, 5], score=BY_PRM)
    values = {name: each.value for name, each in found.estimates.items()}
    assert (values["majority"], values["best_of_5"], values["weighted_vote"]) == (0, 1, 1)
    assert values["best_of_2"] == pytest.approx(7 / 10)  # of 10 pairs 3 hold no 7


def test_a_sample_without_a_score_is_not_chosen_and_not_the_worst():
    row = prompt(sample(True, "7", None), sample(False, "9", 0.1), sample(False, "9", 0.2))
    found = evaluation_of([row], ks=[2, 3], score=BY_PRM)
    assert found.estimates["best_of_2"].value == 0.0 and "best_of_3" not in found.estimates


def test_more_than_one_way_to_write_an_answer():
    assert text_key("7") == text_key(" 7.0 ") == text_key("$7") and text_key("1,000") == text_key("1000")
    assert text_key("New  York") == text_key("new york") != text_key("york") and text_key(" ") is None
    assert text_key("7 apples") != text_key("7")
    assert numeric_key("so it is 18 dollars") == numeric_key("#### 18") and numeric_key("no idea") is None


def test_a_trajectory_is_as_good_as_the_fold_of_its_steps():
    steps = [0.9, 0.4, 0.2]
    values = {fold.value: folded(steps, fold) for fold in StepFold}
    assert values == {
        "min": 0.2,
        "product": pytest.approx(0.072),
        "mean": pytest.approx(0.5),
        "last": 0.2,
        "sum": pytest.approx(1.5),
    }
    assert folded([0.9, None], StepFold.mean) is None and folded([], StepFold.min) is None
    chosen = chosen_by("steps", StepFold.mean)
    assert chosen(Sample(success=True, step_scores={"steps": [0.0, 1.0]})) == 0.5
    assert chosen(Sample(success=True)) is None


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])])
def test_ks_double_up_to_the_samples(samples: int, ks: list[int]):
    assert default_ks(samples) == ks


def test_the_power_table_says_what_more_prompts_and_samples_would_bring():
    # half of the prompts always succeed and half never: more samples of a prompt bring nothing
    found = evaluation_of([prompt(RIGHT, RIGHT)] * 10 + [prompt(WRONG, WRONG)] * 10, ks=[2])
    assert found.spread is not None and found.spread.correlation == pytest.approx(1.0)
    rows = {row.difference: row.prompts for row in found.power_table()}
    assert rows[0.1][1] == rows[0.1][16]
    # the variance between 20 prompts of 0 and 1 is 0.25 * 20 / 19: 15.70 * 0.263 / 0.01 = 413.1
    assert rows[0.1][1] == 414
    assert found.detectable_difference(2) == pytest.approx(math.sqrt(15.698 * 0.25 / 19), rel=1e-3)


def test_one_sample_each_tells_nothing_of_more_samples():
    found = evaluation_of([prompt(RIGHT)] * 5 + [prompt(WRONG)] * 5)
    assert [list(row.prompts) for row in found.power_table()] == [[1]] * 5
    assert evaluation_of([prompt(RIGHT)] * 5).power_table() == []


def test_every_estimate_is_a_declared_metric():
    rows = [prompt(*(sample(at % 2 == 0, "7", 0.1 * at) for at in range(4)), name=f"eval/{n}") for n in range(3)]
    found = evaluation_of(rows, ks=[1, 2, 4], score=BY_PRM)
    assert {"pass_at_4", "pass_all_4", "majority", "best_of_4", "weighted_vote"} <= found.estimates.keys()
    assert all(declared(f"eval/{name}_share") for name in found.estimates)
