import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.credit.reads import before, best_of, largest_return, lookahead, soft_min


def doubles(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_best_of_k_succeeds_unless_all_fail():
    assert best_of(doubles([0.5, 0.0, 1.0]), 2).tolist() == [0.75, 0, 1]
    assert best_of(doubles([0.3]), 1).tolist() == [0.3]


def test_score_before_a_step_is_its_parents_or_its_prompts():
    parent_N, prompt_N = torch.tensor([-1, 0, -1, -1]), torch.tensor([0, 0, 0, 1])
    score_N = doubles([0.5, 1.0, 0.25, 0.75])
    assert before(score_N, parent_N, prompt_N, doubles([0.1, 0.2])).tolist() == [0.1, 0.5, 0.1, 0.2]


def test_prompt_without_a_score_is_worth_the_mean_of_its_first_steps():
    parent_N, prompt_N = torch.tensor([-1, -1, -1, -1]), torch.tensor([0, 0, 0, 1])
    found_N = before(doubles([0.5, math.nan, 1.0, math.nan]), parent_N, prompt_N, doubles([math.nan, math.nan]))
    assert found_N[:3].tolist() == [0.75] * 3
    assert found_N[3].isnan()


def slow_lookahead(change: list[float]) -> list[float]:
    found = []
    for place in range(len(change)):
        ahead = [(distance, each) for distance, each in enumerate(change[place : place + 5]) if abs(each) >= 1e-5]
        found.append(0.7 ** ahead[0][0] * ahead[0][1] if ahead else 0.0)
    return found


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.5, -0.2, 1e-6]), min_size=1, max_size=8), max_size=3))
def test_lookahead_agrees_with_searching_each_path(paths):
    leaf_P = torch.tensor([leaf for leaf, path in enumerate(paths) for _ in path], dtype=torch.int64)
    change_P = doubles([each for path in paths for each in path])
    assert lookahead(change_P, leaf_P).tolist() == pytest.approx([x for path in paths for x in slow_lookahead(path)])


def test_lookahead_does_not_look_past_a_change_that_is_not_known():
    found = lookahead(doubles([0.0, math.nan, 0.5]), torch.zeros(3, dtype=torch.int64))
    assert found[:2].isnan().all()
    assert found[2] == 0.5


def test_soft_min_sums_to_about_the_lowest_score_of_each_trajectory():
    leaf_P = torch.tensor([0, 0, 0, 1, 1])
    weighted = soft_min(doubles([0.5, -0.5, 0.8, 1.0, math.nan]), leaf_P, 2)
    assert weighted[:3].sum().item() == pytest.approx(-0.5, abs=1e-3)
    assert weighted[3] == 1
    assert weighted[4].isnan()


def test_soft_min_is_softmax_of_the_negative_scores_at_a_tenth():
    scores = doubles([0.1, 0.2, -0.05])
    expected = torch.softmax(-scores / 0.1, 0) * scores
    assert soft_min(scores, torch.zeros(3, dtype=torch.int64), 1).tolist() == pytest.approx(expected.tolist())


def test_soft_min_of_far_apart_scores_does_not_overflow():
    assert soft_min(doubles([1000.0, -1000.0]), torch.tensor([0, 0]), 1).tolist() == [0, -1000]


def test_largest_return_is_of_any_step_of_the_batch():
    # returns 0, -1, and 2, 3
    found = largest_return(doubles([1.0, -1.0, -1.0, 3.0]), torch.tensor([0, 0, 1, 1]), gamma=1.0)
    assert found.item() == pytest.approx(3.000001)
    assert largest_return(doubles([]), torch.tensor([], dtype=torch.int64), gamma=1.0).item() == pytest.approx(1e-6)
