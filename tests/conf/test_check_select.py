import pytest

from conf.check_select import band_lets_prompts_pass, prof_has_step_scores, something_is_kept, step_counts_have_room
from conf.compose import compose
from conf.problem import Problem
from conf.schema import Config


def config(*overrides: str) -> Config:
    return compose(["experiment=hop_search", *overrides])


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("choice", ["none", "dapo", "accuracy_band", "balanced"])
def test_shipped_selections_need_nothing_else(choice: str):
    cfg = config(f"select={choice}")
    assert [rule(cfg) for rule in (band_lets_prompts_pass, something_is_kept, prof_has_step_scores)] == [[], [], []]


@pytest.mark.parametrize(("low", "high"), [(0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_a_band_that_nothing_can_pass_is_refused(low: float, high: float):
    cfg = Config()
    cfg.select.min_success_share, cfg.select.max_success_share = low, high
    assert "let no prompt pass" in only(band_lets_prompts_pass(cfg)).text


def test_a_band_of_one_share_passes_with_its_ends_alone():
    cfg = config("select.min_success_share=0.5", "select.max_success_share=0.5")
    assert band_lets_prompts_pass(cfg) == []
    cfg.select.ends_pass = False
    assert only(band_lets_prompts_pass(cfg)).fatal


def test_keeping_nothing_is_refused_and_keeping_all_is_told():
    assert "leave every trajectory out" in only(something_is_kept(config("select=balanced", "select.num_kept=0"))).text
    found = only(something_is_kept(config("select=balanced", "select.num_kept=8", "rollout.num_leaves=8")))
    assert "select.num_kept=8 trajectories of a prompt may train" in found.text and not found.fatal


def test_prof_names_the_source_it_could_ask():
    assert "names no source of steps" in only(prof_has_step_scores(config("select=prof"))).text
    assert "Use select.step_source=progress" in only(prof_has_step_scores(config("select=prof"))).text
    assert prof_has_step_scores(config("select=prof", "select.step_source=progress")) == []


def test_prof_asks_no_source_of_trajectories_and_none_that_is_not_there():
    assert (
        '"answer" scores whole' in only(prof_has_step_scores(config("select=prof", "select.step_source=answer"))).text
    )
    found = only(prof_has_step_scores(config("select=prof", "select.step_source=progres"))).text
    assert '"progres" is no source' in found and 'Did you mean "progress"?' in found


def test_a_source_that_nothing_asks_is_told():
    found = only(prof_has_step_scores(config("select.step_source=progress")))
    assert "changes nothing with select.keep=all" in found.text and not found.fatal


def test_step_counts_leave_room_and_a_penalty_is_none_below_zero():
    prof = ("select=prof", "select.step_source=progress")
    assert step_counts_have_room(config(*prof)) == []
    assert "every trajectory would pay" in only(step_counts_have_room(config(*prof, "select.min_steps=31"))).text
    assert "must be 0 or more" in only(step_counts_have_room(config(*prof, "select.step_count_penalty=-1"))).text
    assert step_counts_have_room(config("select.min_steps=31")) == []
