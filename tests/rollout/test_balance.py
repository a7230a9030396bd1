from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from rollout.balance import at_home, least_busy


def test_the_next_tree_goes_where_the_fewest_tokens_are_expected_not_the_fewest_trees():
    # three short trees are 30 tokens, one long one is 100
    assert least_busy([[100.0], [10.0, 10.0, 10.0]], most=4) == 1


def test_of_workers_with_equally_many_tokens_the_one_with_fewer_trees_is_next_and_then_the_first():
    assert least_busy([[10.0, 10.0], [20.0]], most=4) == 1
    assert least_busy([[], []], most=4) == 0


def test_nobody_is_next_while_all_have_what_they_may_have():
    assert least_busy([[1.0, 1.0], [1.0]], most=2) == 1
    assert least_busy([[1.0, 1.0], [1.0, 1.0]], most=2) is None
    assert least_busy([], most=2) is None


@given(costs=st.lists(st.floats(1, 100), max_size=40), num=st.integers(1, 5), most=st.integers(1, 8))
def test_dealing_trees_out_keeps_workers_within_one_tree_of_each_other(costs: list[float], num: int, most: int):
    expected: list[list[float]] = [[] for _ in range(num)]
    for cost in costs:
        place = least_busy(expected, most)
        if place is None:
            break
        expected[place].append(cost)
    assert sum(map(len, expected)) == min(len(costs), num * most)  # fewer workers are given fewer trees at a time
    if len(costs) <= most:  # nobody was passed over for having too many
        assert max(map(sum, expected)) - min(map(sum, expected)) <= max(costs, default=0)


def test_what_goes_on_from_one_prompt_stays_on_one_worker_until_that_has_too_much_to_do():
    home = at_home("train/7", [0, 0, 0], slack=2)
    busy = [0, 0, 0]
    for asked in (0, 1, 2):
        busy[home] = asked
        assert at_home("train/7", busy, slack=2) == home
    busy[home] = 3
    assert at_home("train/7", busy, slack=2) != home


def test_a_worker_that_is_gone_is_nobodys_home():
    home = at_home("train/7", [0.0, 0.0], slack=2)
    running = [0.0, 0.0]
    running[home] = math.inf
    assert at_home("train/7", running, slack=2) == 1 - home


def test_prompts_spread_over_the_workers():
    homes = [at_home(f"train/{number}", [0, 0, 0], slack=0) for number in range(300)]
    assert min(homes.count(place) for place in range(3)) > 70  # 100 each, give or take
