"""How like predicted calls are to a reference's, and what each step is worth."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.matching import assigned, assigned_greedily, similarity, step_rewards, transported

WANTED = ("search", {"query": "x", "limit": 3})


def test_similarity_of_two_calls():
    # (1 + 2/2 + 2) / 4; one of two names, right value: (1 + 1/2 + 1) / 4; another tool
    same, half = ("Search", {"query": "x", "limit": 3}), ("search", {"query": "x"})
    assert similarity([same, half, ("other", {"query": "x"})], [WANTED]).flatten().tolist() == [1, 0.625, 0]
    # one of three names, wrong value: (1 + 1/3 + 0) / 3
    many = ("find", {"a": 1, "b": 2, "c": 3})
    assert similarity([many], [("find", {"a": 9})]).item() == pytest.approx(0.4444, abs=1e-4)


def test_call_without_parameters_is_matched_by_its_name():
    assert similarity([("now", {})], [("now", {})]).item() == 1


def test_best_assignment_is_not_the_greedy_one():
    scores = torch.tensor([[0.9, 0.8], [0.8, 0.0]], dtype=torch.float64)
    assert assigned(scores).tolist() == [0.8, 0.8]
    assert assigned_greedily(scores).tolist() == [0.9, 0]


def test_call_without_a_partner_earns_nothing():
    scores = torch.tensor([[0.5], [0.75], [0.25]])
    assert assigned(scores).tolist() == assigned_greedily(scores).tolist() == [0, 0.75, 0]


@pytest.mark.parametrize("rewards", [assigned, assigned_greedily, transported])
def test_nothing_predicted_and_nothing_wanted(rewards):
    assert rewards(similarity([], [WANTED])).tolist() == []
    assert rewards(similarity([WANTED], [])).tolist() == [0]


MATRICES = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(st.floats(0, 1), min_size=width, max_size=width), min_size=1, max_size=4)
)


@settings(max_examples=20, deadline=None)
@given(MATRICES)
def test_no_assignment_is_worth_more(rows):
    scores = torch.tensor(rows, dtype=torch.float64)
    num_rows, num_columns = scores.shape
    size = min(num_rows, num_columns)
    best = max(
        sum(rows[row][column] for row, column in zip(chosen, columns, strict=True))
        for chosen in itertools.combinations(range(num_rows), size)
        for columns in itertools.permutations(range(num_columns), size)
    )
    assert assigned(scores).sum().item() == pytest.approx(best)
    assert assigned_greedily(scores).sum().item() <= best + 1e-9


@settings(max_examples=20, deadline=None)
@given(MATRICES)
def test_transport_moves_all_mass_and_earns_no_more_than_the_best_partner_of_each(rows):
    scores = torch.tensor(rows, dtype=torch.float64)
    assert (transported(scores) <= scores.max(1).values / len(rows) + 1e-6).all()
    # where everything is alike, all mass earns the same
    assert transported(torch.ones_like(scores)).sum().item() == pytest.approx(1)


def test_transport_of_a_clear_match_is_the_assignment_over_the_number_of_calls():
    assert transported(torch.eye(2, dtype=torch.float64)).tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_step_is_worth_the_mean_of_its_calls_and_a_step_without_calls_has_none():
    assert step_rewards(torch.tensor([1.0, 0.5, 0.25]), [0, 0, 2], 3) == [0.75, None, 0.25]
