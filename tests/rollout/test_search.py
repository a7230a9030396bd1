from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.search import WrongRollout, first_error, omega_choice, omega_scores, puct, step_prior


def found(values: list[float]) -> tuple[int, list[int]]:
    probed: list[int] = []

    async def probe(step: int) -> float:
        probed.append(step)
        return values[step]

    return asyncio.run(first_error(probe, len(values))), probed


def test_puct_of_the_worked_example():
    assert puct(0.4, 0.3, num_parent=9, num_visits=2, c=1.25) == pytest.approx(0.775)


def test_prior_is_the_geometric_mean_of_the_tokens():
    assert step_prior([math.log(0.5), math.log(0.125)]) == pytest.approx(0.25)
    assert step_prior([]) == 1


def test_omega_chooses_the_third_of_the_worked_example():
    pool = [WrongRollout(0.25, 100, 0), WrongRollout(0.5, 250, 1), WrongRollout(0.75, 400, 3)]
    assert omega_scores(pool, 0.5, 0.9, 500, 0.125) == pytest.approx([0.832205, 0.795820, 0.835423], abs=1e-6)
    assert omega_choice(pool, 0.5, 0.9, 500, 0.125) == 2


def test_a_state_that_is_always_or_never_solved_is_not_searched():
    pool = [WrongRollout(1.0, 1, 0), WrongRollout(0.0, 1, 0)]
    assert omega_choice(pool, 0.5, 0.9, 500, 0.125) is None
    assert omega_choice([*pool, WrongRollout(0.1, 900, 9)], 0.5, 0.9, 500, 0.125) == 2


def test_binary_search_probes_three_steps_of_eight():
    assert found([0.9, 0.8, 0.6, 0.6, 0.3, 0, 0, 0]) == (5, [3, 5, 4])


@given(right=st.integers(0, 40), wrong=st.integers(1, 40))
def test_of_values_that_stay_zero_binary_search_finds_what_a_linear_scan_finds(right: int, wrong: int):
    values = [0.5] * right + [0.0] * wrong
    step, probed = found(values)
    assert step == values.index(0.0)
    assert len(probed) <= math.ceil(math.log2(len(values)))


@given(values=st.lists(st.sampled_from([0.0, 0.5]), max_size=40))
def test_of_any_values_it_finds_a_step_that_fails_behind_one_that_does_not(values: list[float]):
    values = [*values, 0.0]
    step, _ = found(values)
    assert values[step] == 0 and (step == 0 or values[step - 1] > 0)
