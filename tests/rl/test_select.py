import copy
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from conf.errors import ConfigError
from conf.schema import Config, CreditConfig, Keep, Level, Normalizer, Scope, SelectConfig, SignalUse, TermConfig
from rewards.drawn import parse_scored, row_of
from rewards.types import Score, ScoredTree
from rl.credited import credited
from rl.select import Reason, Selection, consistency, num_dropped, selected
from rollout.types import StopReason

PROF_SCORES = [
    [0.9, 0.8, 0.9],
    [0.9, 0.2, 0.6],
    [0.7, 0.7],
    [0.95, 0.9, 0.85, 0.9],
    [0.8],
    [0.6, 0.3],
    [0.9, 0.9, 0.1],
    [0.2, 0.1, 0.3],
]
"""Step scores of eight trajectories of one prompt, of which the first five are right."""
BATCH_MEAN = 13.5 / 21


def chains(scores: list[list[float]], num_right: int) -> ScoredTree:
    """One prompt's trajectories; the steps of the first are called 0_0, 0_1, ..."""
    names = [[f"{chain}_{step}" for step in range(len(steps))] for chain, steps in enumerate(scores)]
    return parse_scored(
        f"q -> ({', '.join(' -> '.join(chain) for chain in names)})",
        steps={
            name: score
            for chain, steps in zip(names, scores, strict=True)
            for name, score in zip(chain, steps, strict=True)
        },
        outcomes={chain[-1]: float(number < num_right) for number, chain in enumerate(names)},
        step_signal="prm",
    )


def kept(selection: Selection, tree: int = 0) -> list[str]:
    """Names of the leaves that are left to train."""
    left = selection.trees[tree].tree
    return [left.nodes[leaf].action_text for leaf in left.trained_leaves()]


def grpo() -> CreditConfig:
    return CreditConfig(terms={"trajectory": TermConfig(signals={"outcome": SignalUse()})})


def prof(**more: Any) -> SelectConfig:
    return SelectConfig(**{"keep": Keep.prof, "step_source": "prm", **more})


# PROF


def test_consistency_is_the_published_one():
    found = [
        consistency(steps, is_right=number < 5, centre=BATCH_MEAN) - 10 * (len(steps) < 2)
        for number, steps in enumerate(PROF_SCORES)
    ]
    expected = [0.447619, -0.152381, 0.114286, 0.514286, -9.685714, 0.385714, 0.019048, 0.885714]
    assert found == approx(expected, abs=1e-6)


def test_prof_keeps_the_published_trajectories_and_compares_them_alone():
    cfg = Config(select=prof(), credit=grpo())
    found = credited([chains(PROF_SCORES, num_right=5)], cfg)
    assert kept(found.selection) == ["0_2", "3_3", "5_1", "7_2"]
    advantage_L = found.credit.advantage_N[found.forest.leaf_node_L]
    assert advantage_L.tolist() == approx([0.866024, 0.866024, -0.866024, -0.866024], abs=1e-6)


@pytest.mark.parametrize(
    ("num_right", "expected"),
    [(0, (0, 4)), (1, (1, 3)), *((each, (2, 2)) for each in range(2, 7)), (7, (3, 1)), (8, (4, 0))],
)
def test_prof_keeps_the_published_counts(num_right: int, expected: tuple[int, int]):
    right, wrong = num_dropped(num_right, 8 - num_right, num_kept=4)
    assert (num_right - right, 8 - num_right - wrong) == expected


@settings(max_examples=50, deadline=None)
@given(num_right=st.integers(0, 9), num_wrong=st.integers(0, 9), num_kept=st.integers(1, 9))
def test_what_is_kept_is_as_balanced_as_the_best_of_all_choices(num_right: int, num_wrong: int, num_kept: int):
    right, wrong = num_dropped(num_right, num_wrong, num_kept)
    choices = [
        (kept_right, kept_wrong)
        for kept_right, kept_wrong in itertools.product(range(num_right + 1), range(num_wrong + 1))
        if kept_right + kept_wrong == min(num_kept, num_right + num_wrong)
    ]
    assert (num_right - right, num_wrong - wrong) in choices
    assert (num_right - right) * (num_wrong - wrong) == max(first * second for first, second in choices)


def test_in_proportion_six_of_eight_right_stay_three_of_four():
    assert num_dropped(6, 2, num_kept=4, in_proportion=True) == (3, 1)
    tree = chains([[0.1, 0.1], [0.9, 0.9], [0.2, 0.2], [0.8, 0.8]], num_right=4)
    assert kept(selected([tree], prof(keep=Keep.prof_ratio, num_kept=2), seed=0)) == ["1_1", "3_1"]


def test_of_the_wrong_ones_those_stay_whose_steps_were_called_bad():
    tree = chains([[0.9, 0.9], [0.1, 0.1], [0.5, 0.5]], num_right=0)
    assert kept(selected([tree], prof(num_kept=1), seed=0)) == ["1_1"]


def test_correct_only_draws_among_the_wrong_ones_and_trusts_the_scores_of_the_right_ones():
    tree = chains([[0.9, 0.9], [0.1, 0.1], [0.9, 0.9], [0.1, 0.1]], num_right=2)
    lots = {tuple(kept(selected([tree], prof(keep=Keep.prof_correct, num_kept=2), seed))) for seed in range(20)}
    assert lots == {("0_1", "2_1"), ("0_1", "3_1")}


def test_a_right_or_wrong_answer_in_one_step_goes_first():
    tree = chains([[1.0], [0.6, 0.6], [0.0], [0.4, 0.4]], num_right=2)
    assert kept(selected([tree], prof(num_kept=2), seed=0)) == ["1_1", "3_1"]
    assert kept(selected([tree], prof(num_kept=2, min_steps=1), seed=0)) == ["0_0", "2_0"]
    assert kept(selected([tree], prof(num_kept=2, step_count_penalty=0.0), seed=0)) == ["0_0", "2_0"]


def test_a_trajectory_with_a_failed_score_is_left_out_as_unjudged_and_a_step_with_nothing_to_say_is_not():
    tree = parse_scored(
        "q -> (a -> a1, b -> b1, c -> c1)",
        steps={"a": Score.failed("503"), "a1": 1.0, "b": None, "b1": 0.6, "c": 0.9, "c1": 0.9},
        outcomes={"a1": 1.0, "b1": 1.0, "c1": Score.timed_out("10 s")},
        step_signal="prm",
    )
    selection = selected([tree], prof(num_kept=4), seed=0)
    assert kept(selection) == ["b1"]
    assert selection.left_out == [{row_of(tree.tree, name): Reason.unjudged for name in ("a1", "c1")}]


def test_a_source_that_scored_no_step_is_refused():
    with pytest.raises(ConfigError, match=r'select.step_source="judge" scored no step.*Scored by: prm'):
        selected([chains(PROF_SCORES, 5)], prof(step_source="judge"), seed=0)


# Trees


def forked(**outcomes: float) -> ScoredTree:
    return parse_scored("q -> (a -> (a1, a2), b)", outcomes=outcomes or {"a1": 1.0, "a2": 0.0, "b": 0.0})


def test_a_step_that_a_kept_trajectory_shares_goes_on_training():
    selection = selected([forked()], SelectConfig(keep=Keep.balanced, num_kept=1), seed=0)
    found = credited([forked()], Config(select=SelectConfig(keep=Keep.balanced, num_kept=2), credit=grpo()))
    assert len(kept(selection)) == 1
    assert found.forest.num_leaves_N.max() <= 2 and len(found.forest.leaf_node_L) == 2


def test_nothing_recorded_is_changed():
    tree = forked()
    before = copy.deepcopy(tree)
    selection = selected([tree], SelectConfig(keep=Keep.balanced, num_kept=1), seed=0)
    assert tree == before
    assert [len(each.tree.nodes) for each in selection.trees] == [4]


def test_a_trajectory_left_out_enters_no_statistic():
    whole = parse_scored("q -> (a, b, c)", outcomes={"a": 1.0, "b": 0.0, "c": 0.0})
    without = parse_scored("q -> (a, b, c)", outcomes={"a": 1.0, "b": 0.0, "c": 0.0}, pruned=["b"])
    for seed in range(9):  # until the lot falls on b
        found = credited([whole], Config(seed=seed, select=SelectConfig(keep=Keep.balanced, num_kept=2), credit=grpo()))
        if kept(found.selection) == ["a", "c"]:
            break
    assert found.credit.advantage_N.tolist() == credited([without], Config(credit=grpo())).credit.advantage_N.tolist()
    assert found.credit.advantage_N.tolist() == approx([0.7071, -0.7071], abs=1e-3)


def test_the_same_seed_draws_the_same_lot_and_another_prompt_another():
    trees = [
        parse_scored("q -> (a, b, c, d)", outcomes=dict.fromkeys("abcd", 1.0), prompt_id=f"train/{number}")
        for number in range(12)
    ]
    lots = [kept(selected(trees, SelectConfig(keep=Keep.balanced, num_kept=1), seed=3), tree) for tree in range(12)]
    again = selected(trees[5:6], SelectConfig(keep=Keep.balanced, num_kept=1), seed=3)
    assert lots[5] == kept(again)
    assert len({tuple(lot) for lot in lots}) > 1


def test_what_the_world_broke_is_neither_kept_nor_counted():
    tree = parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0}, stops={"b": StopReason.tool_crashed})
    selection = selected([tree], SelectConfig(min_success_share=0.9, max_success_share=1.0), seed=0)
    assert kept(selection) == ["a"]
    assert selection.shares() == {"band": 0.0, "unjudged": 0.0, "outranked": 0.0, "silent": 0.0}


# Bands


@pytest.mark.parametrize(("num_right", "passes"), [(0, False), (1, True), (3, True), (4, True), (5, False)])
def test_a_band_of_middling_prompts_holds_its_ends(num_right: int, passes: bool):
    band = SelectConfig(min_success_share=0.2, max_success_share=0.8)
    selection = selected([chains([[0.5]] * 5, num_right)], band, seed=0)
    assert bool(kept(selection)) == passes
    assert selection.num_missing_prompts() == (not passes)


@pytest.mark.parametrize(("num_right", "passes"), [(1, False), (2, True), (4, False)])
def test_a_strict_band_does_not(num_right: int, passes: bool):
    band = SelectConfig(min_success_share=0.2, max_success_share=0.8, ends_pass=False)
    assert bool(kept(selected([chains([[0.5]] * 5, num_right)], band, seed=0))) == passes


def test_the_share_is_of_trajectories_whose_outcome_is_known():
    band = SelectConfig(min_success_share=0.2, max_success_share=0.8)
    known = parse_scored("q -> (a, b, c)", outcomes={"a": 1.0, "b": 0.0, "c": Score.failed("503")})
    unknown = parse_scored("q -> (a, b)", outcomes={"a": Score.failed("503"), "b": Score.failed("503")})
    selection = selected([known, unknown], band, seed=0)
    assert (kept(selection, 0), kept(selection, 1)) == (["a", "b", "c"], [])
    assert selection.shares()["unjudged"] == 2 / 5


def test_without_a_band_a_prompt_that_nobody_judged_stays():
    tree = parse_scored("q -> (a, b)", outcomes={"a": Score.failed("503"), "b": Score.failed("503")})
    assert kept(selected([tree], SelectConfig(), seed=0)) == ["a", "b"]


# Dynamic sampling


def blended(**more: Any) -> Config:
    step = TermConfig(
        level=Level.step, signals={"step": SignalUse()}, scope=Scope.siblings, normalizer=Normalizer.center
    )
    credit = CreditConfig(terms={**grpo().terms, "step": step}, **more)
    return Config(credit=credit, select=SelectConfig(drop_silent_prompts=True))


def test_a_prompt_with_equal_outcomes_stays_where_its_steps_differ():
    told = parse_scored("q -> (a, b)", steps={"a": 1.0, "b": 0.0}, outcomes={"a": 1.0, "b": 1.0})
    silent = parse_scored("q -> (a, b)", steps={"a": 1.0, "b": 1.0}, outcomes={"a": 1.0, "b": 1.0})
    found = credited([told, silent], blended())
    assert found.selection.left_out == [{}, {0: Reason.silent, 1: Reason.silent}]
    assert found.selection.num_missing_prompts() == 1
    assert found.credit.advantage_N.tolist() == [0.5, -0.5]


def test_a_silent_prompt_is_silent_before_the_sum_is_whitened_and_no_part_of_its_mean():
    loud = parse_scored("q -> (a, b)", steps={"a": 3.0, "b": 0.0}, outcomes={"a": 1.0, "b": 1.0})
    lone = parse_scored("q -> a", steps={"a": 1.0}, outcomes={"a": 1.0})
    found = credited([loud, lone], blended(whiten=True))
    assert found.selection.num_missing_prompts() == 1
    alone = credited([loud], blended(whiten=True))
    assert found.credit.advantage_N.tolist() == alone.credit.advantage_N.tolist()


def test_a_batch_of_which_nothing_is_left_gives_no_credit():
    silent = parse_scored("q -> (a, b)", steps={"a": 1.0, "b": 1.0}, outcomes={"a": 1.0, "b": 1.0})
    found = credited([silent], blended())
    assert (len(found.forest.parent_N), found.selection.num_missing_prompts()) == (0, 1)
    assert found.selection.shares()["silent"] == 1.0
