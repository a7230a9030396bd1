"""Rules about selection: can it keep something, and does it know whom to ask?"""

from __future__ import annotations

from collections.abc import Callable

from conf.check_expanders import OF_NUM_LEAVES, most_trajectories
from conf.check_rewards import level_of
from conf.keys import did_you_mean
from conf.problem import Problem
from conf.schema import Config, Keep, Level

PROF = (Keep.prof, Keep.prof_correct, Keep.prof_ratio)
"""Choices that read the scores of steps."""


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [band_lets_prompts_pass, something_is_kept, prof_has_step_scores, step_counts_have_room, refills_can_happen]


def band_lets_prompts_pass(cfg: Config) -> list[Problem]:
    """Two shares, the lower first."""
    low, high = cfg.select.min_success_share, cfg.select.max_success_share
    if 0 <= low < high <= 1 or (0 <= low == high <= 1 and cfg.select.ends_pass):
        return []
    return [
        Problem(
            f"select.min_success_share={low} and select.max_success_share={high} let no prompt pass: they must be "
            f"shares in [0, 1], the lower first. Use e.g. 0.2 and 0.8, or 0 and 1 for every prompt."
        )
    ]


def something_is_kept(cfg: Config) -> list[Problem]:
    """A number below 1 keeps nothing, and one that no prompt reaches selects nothing."""
    select, rollout = cfg.select, cfg.rollout
    if select.keep is Keep.all:
        return []
    if select.num_kept < 1:
        return [
            Problem(f"select.num_kept={select.num_kept} would leave every trajectory out. Use e.g. select.num_kept=4.")
        ]
    most = most_trajectories(rollout)
    if most is None or select.num_kept < most:
        return []
    has = f"rollout.num_leaves={most}" if rollout.expander in OF_NUM_LEAVES else f"{most} ({rollout.expander.value})"
    return [
        Problem(
            f"select.keep={select.keep.value} changes nothing: select.num_kept={select.num_kept} trajectories of a "
            f"prompt may train, and it has {has}. Use a smaller select.num_kept, or "
            f"select=none.",
            fatal=False,
        )
    ]


def prof_has_step_scores(cfg: Config) -> list[Problem]:
    """PROF asks one source of step scores, and nothing else does."""
    name, keep = cfg.select.step_source, cfg.select.keep
    source = cfg.rewards.sources.get(name)
    if keep not in PROF:
        text = (
            f'select.step_source="{name}" changes nothing with select.keep={keep.value}. '
            "Use select=prof, or leave it empty."
        )
        return [Problem(text, fatal=False)] if name else []
    if source is not None and level_of(source) is not Level.trajectory:
        return []
    of_steps = [each for each, its in cfg.rewards.sources.items() if level_of(its) is Level.step]
    what = (
        "names no source of steps"
        if not name
        else f'"{name}" is no source'
        if source is None
        else f'"{name}" scores whole trajectories'
    )
    way_out = f"Use select.step_source={of_steps[0]}" if of_steps else "Add a source that scores steps, with weight=0"
    return [
        Problem(
            f"select.step_source {what}, and select.keep={keep.value} compares the scores of steps with how their "
            f"trajectory ended. {way_out}, or select=balanced, which needs none.{did_you_mean(name, of_steps)}"
        )
    ]


def step_counts_have_room(cfg: Config) -> list[Problem]:
    """PROF: some number of steps must be free of the penalty, and the penalty must not be a premium."""
    select = cfg.select
    if select.keep not in PROF:
        return []
    found = []
    if not select.min_steps <= select.max_steps:
        found.append(
            Problem(
                f"select.min_steps={select.min_steps} is more than select.max_steps={select.max_steps}: every "
                f"trajectory would pay. Use e.g. select.min_steps=2 and select.max_steps=30."
            )
        )
    if not select.step_count_penalty >= 0:
        found.append(
            Problem(
                f"select.step_count_penalty={select.step_count_penalty} must be 0 or more: below 0 it would be a "
                f"premium on trajectories that are too short or too long."
            )
        )
    return found


def refills_can_happen(cfg: Config) -> list[Problem]:
    """More prompts are drawn where some were left out whole."""
    select = cfg.select
    if select.max_refills < 0:
        return [Problem(f"select.max_refills={select.max_refills} must be 0 or more: it counts draws of prompts.")]
    has_band = select.min_success_share > 0 or select.max_success_share < 1 or not select.ends_pass
    if not select.max_refills or select.drop_silent_prompts or has_band or select.keep is not Keep.all:
        return []
    return [
        Problem(
            f"select.max_refills={select.max_refills} changes nothing: no prompt is ever left out whole. Use "
            f"select.drop_silent_prompts=true (select=dapo), a band of success shares, or select.max_refills=0.",
            fatal=False,
        )
    ]
