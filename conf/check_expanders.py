"""Rules about how trees grow: do an expander's numbers fit each other, its judge, and the credit of its trees?"""

from __future__ import annotations

import math
from collections.abc import Callable

from conf.check_rewards import level_of
from conf.keys import did_you_mean
from conf.problem import Problem, value_of
from conf.schema import Config, ExpanderKind, GaeLevel, Level, RolloutConfig, Scope, Survivors

AT_LEAST_ONE = (
    "rollout.token_forks",
    "rollout.segment_tokens",
    "rollout.num_candidates",
    "rollout.search_simulations",
)
NOT_NEGATIVE = (
    "rollout.segment_leaves",
    "rollout.segment_first_max",
    "rollout.choice_temperature",
    "rollout.search_c",
    "rollout.max_nodes",
    "rollout.max_tree_tokens",
)
SEARCHES = (ExpanderKind.best_first, ExpanderKind.mcts)
OF_NUM_LEAVES = (ExpanderKind.chains, ExpanderKind.beam_forks, ExpanderKind.beam)
"""Expanders that grow num_leaves trajectories."""
SEVERAL_TREES = (ExpanderKind.random_expand, ExpanderKind.entropy_expand)
"""Expanders that begin a prompt with several trees (`Node.branch`)."""


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [
        numbers_of_expanders,
        entropy_keeps_what_it_grows,
        segments_can_branch,
        candidates_are_several,
        judge_is_a_step_source,
        comb_is_credited_by_step,
        budgets_have_room,
    ]


def most_trajectories(rollout: RolloutConfig) -> int | None:
    """Trajectories with an outcome that a prompt has at most; None where only the search knows."""
    per_tree = 1 + rollout.expand_rounds * rollout.expand_nodes
    match rollout.expander:
        case ExpanderKind.chains | ExpanderKind.beam_forks | ExpanderKind.beam:
            return rollout.num_leaves
        case ExpanderKind.random_expand:
            return rollout.num_trees * (rollout.keep_leaves or per_tree)
        case ExpanderKind.entropy_expand:
            per_tree = 1 + rollout.expand_rounds * rollout.expand_nodes * rollout.token_forks
            return rollout.num_trees * (rollout.keep_leaves or per_tree)
        case ExpanderKind.segments:
            return rollout.segment_leaves or math.prod(rollout.segment_branches)
        case ExpanderKind.comb:
            return 1
        case _:
            return None


def numbers_of_expanders(cfg: Config) -> list[Problem]:
    """Counts and limits."""
    found = [(key, "1 or more") for key in AT_LEAST_ONE if not value_of(cfg, key) >= 1]
    found += [(key, "0 or more") for key in NOT_NEGATIVE if not value_of(cfg, key) >= 0]
    return [Problem(f"{key}={value_of(cfg, key)} cannot be: it must be {wanted}.") for key, wanted in found]


def entropy_keeps_what_it_grows(cfg: Config) -> list[Problem]:
    """entropy_expand: a tree has its first chain's leaf and token_forks more for each chosen token."""
    rollout = cfg.rollout
    if rollout.expander is not ExpanderKind.entropy_expand:
        return []
    leaves = 1 + rollout.expand_rounds * rollout.expand_nodes * rollout.token_forks
    if rollout.keep_leaves > leaves:
        return [
            Problem(
                f"rollout.keep_leaves={rollout.keep_leaves}, but a tree grows {leaves} trajectories only (1 + "
                f"rollout.expand_rounds={rollout.expand_rounds} x rollout.expand_nodes={rollout.expand_nodes} x "
                f"rollout.token_forks={rollout.token_forks}). Use rollout.keep_leaves={leaves}, or 0 to keep all."
            )
        ]
    if rollout.max_turn_tokens > 1:
        return []
    return [
        Problem(
            "rollout.expander=entropy_expand branches inside turns, and rollout.max_turn_tokens=1 leaves no token "
            "behind the first: nothing would ever branch. Use rollout=tree_grpo, or longer turns."
        )
    ]


def segments_can_branch(cfg: Config) -> list[Problem]:
    """segments: each depth has branches, there is text for them, and the numbers of TreePO's budget fit."""
    rollout = cfg.rollout
    branches, shown = rollout.segment_branches, f"rollout.segment_branches={rollout.segment_branches}"
    if rollout.expander is not ExpanderKind.segments:
        return []
    if not branches or min(branches) < 1:
        return [Problem(f"{shown} cannot be: each depth needs branches, 1 or more, e.g. [6, 6, 6].")]
    found = []
    if rollout.segment_first_max and not rollout.segment_leaves:
        found.append(
            Problem(
                f"rollout.segment_first_max={rollout.segment_first_max} changes nothing: the prompt's branches are "
                f"drawn only where rollout.segment_leaves says how many trajectories to come to. Use "
                f"rollout.segment_leaves=16, or rollout.segment_first_max=0.",
                fatal=False,
            )
        )
    if 0 < rollout.segment_first_max < branches[0]:
        found.append(
            Problem(
                f"rollout.segment_first_max={rollout.segment_first_max} is less than the {branches[0]} branches that "
                f"{shown} gives the prompt at least. Use rollout.segment_first_max={branches[0]} or more, or 0."
            )
        )
    cut = rollout.segment_tokens * (len(branches) - 1)
    if cut >= rollout.max_turn_tokens and not rollout.segment_leaves:
        found.append(
            Problem(
                f"{shown} cut a turn at token {cut} last (rollout.segment_tokens={rollout.segment_tokens}), and "
                f"rollout.max_turn_tokens={rollout.max_turn_tokens} ends it before: the last branches would begin in "
                f"later turns, or nowhere. Use rollout.segment_tokens="
                f"{max((rollout.max_turn_tokens - 1) // max(len(branches) - 1, 1), 1)}, or longer turns.",
                fatal=False,
            )
        )
    return found


def candidates_are_several(cfg: Config) -> list[Problem]:
    """One candidate leaves no choice."""
    rollout = cfg.rollout
    key, num = "rollout.max_forks", rollout.max_forks
    if rollout.expander is ExpanderKind.comb:
        key, num = "rollout.num_candidates", rollout.num_candidates
    elif rollout.expander not in (ExpanderKind.beam, *SEARCHES):
        return []
    if num != 1:
        return []
    text = f"{key}=1 gives rollout.expander={rollout.expander.value} one candidate of each step, and nothing to choose"
    return [Problem(f"{text} from. Use {key}=4, or rollout=chains.", fatal=False)]


def needs_judge(rollout: RolloutConfig) -> bool:
    """Whether the tree is led by scores, and blind without."""
    if rollout.expander is ExpanderKind.beam_forks:
        return rollout.survivors is Survivors.scored
    return rollout.expander in (ExpanderKind.beam, *SEARCHES)


def judge_is_a_step_source(cfg: Config) -> list[Problem]:
    """Who scores candidates while a tree grows is there, and scores steps."""
    rollout, sources = cfg.rollout, cfg.rewards.sources
    shown = f"rollout.expander={rollout.expander.value}"
    if not rollout.judge:
        if not needs_judge(rollout):
            return []
        text = f"{shown} goes on from the steps that a judge scores best, and rollout.judge names none"
        return [Problem(f"{text}: it would take the first ones. Set it to a step source of rewards.sources.")]
    if not needs_judge(rollout) and rollout.expander is not ExpanderKind.comb:
        text = f'rollout.judge="{rollout.judge}" is never asked: {shown} chooses without scores'
        return [Problem(f"{text}. Leave it empty, or use rollout=slate or rollout=prm_beam.", fatal=False)]
    if rollout.judge not in sources:
        known = ", ".join(sources) or "none"
        return [
            Problem(
                f'rollout.judge="{rollout.judge}" is no source; rewards.sources has {known}.'
                f"{did_you_mean(rollout.judge, sources)}"
            )
        ]
    level = level_of(sources[rollout.judge])
    if level is Level.step:
        return []
    said = f"scores each {level.value}" if level else "cannot be loaded"
    return [Problem(f'rollout.judge="{rollout.judge}" {said}, and candidates are steps. Name a source of steps.')]


def comb_is_credited_by_step(cfg: Config) -> list[Problem]:
    """comb: one candidate of each step goes on, so there is one outcome and nothing to compare it with."""
    if cfg.rollout.expander is not ExpanderKind.comb:
        return []
    terms = {name: term for name, term in cfg.credit.terms.items() if term.weight != 0}
    among_siblings = [term for term in terms.values() if term.level is Level.step and term.scope is Scope.siblings]
    if among_siblings or cfg.credit.gae.level is not GaeLevel.off:
        return []
    return [
        Problem(
            "rollout.expander=comb: the candidates of a step are compared by what is said of them alone, since only "
            "one of them has an outcome, and no term of credit compares siblings: next to nothing would be learned. "
            "Use credit=slate, or add a term with level=step and scope=siblings.",
            fatal=False,
        )
    ]


def budgets_have_room(cfg: Config) -> list[Problem]:
    """best_first and mcts: a budget holds a first expansion; others read none."""
    rollout, found = cfg.rollout, []
    for key, needed in (
        ("max_nodes", rollout.max_forks),
        ("max_tree_tokens", rollout.max_forks * rollout.max_turn_tokens),
    ):
        value = getattr(rollout, key)
        if value and rollout.expander not in SEARCHES:
            text = f"rollout.{key}={value} changes nothing: rollout.expander={rollout.expander.value} has no budget"
            found.append(Problem(f"{text}. Use rollout.{key}=0, or rollout=best_first.", fatal=False))
        elif 0 < value < needed:
            text = f"rollout.{key}={value} does not hold the first {rollout.max_forks} steps (rollout.max_forks)"
            found.append(Problem(f"{text}: no search would begin. Use rollout.{key}={needed} or more, or 0."))
    return found
