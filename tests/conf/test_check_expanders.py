"""Every rule about growing trees, each with the setting that breaks it."""

from __future__ import annotations

import pytest

from conf.check_expanders import most_trajectories, rules
from conf.compose import compose
from conf.schema import Config


def found(*overrides: str) -> list[tuple[bool, str]]:
    cfg: Config = compose(["experiment=hop_search", *overrides])
    return [(problem.fatal, problem.text) for rule in rules() for problem in rule(cfg)]


def only(*overrides: str) -> tuple[bool, str]:
    problems = found(*overrides)
    assert len(problems) == 1, problems
    return problems[0]


SLATE = ["rollout=slate", "credit=slate", "rollout.judge=progress"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout=tree"],
        ["rollout=chains"],
        ["rollout=tree_grpo"],
        ["rollout=tree_scored", "rollout.judge=progress"],
        ["rollout=prm_beam", "rollout.judge=progress"],
        ["rollout=best_first", "rollout.judge=progress"],
        ["rollout=mcts", "rollout.judge=progress"],
        ["rollout=tree_rl"],
        ["rollout=spo_tree", "rollout.max_turn_tokens=512"],
        ["rollout=tree_rpo", "rollout.max_turn_tokens=512"],
        ["rollout=tree_po"],
        SLATE,
    ],
    ids=lambda overrides: overrides[0],
)
def test_shipped_groups_are_in_order(overrides: list[str]):
    assert found(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "fatal", "text"),
    [
        (["rollout.token_forks=0"], True, "rollout.token_forks=0 cannot be: it must be 1 or more."),
        (["rollout.search_c=-1"], True, "rollout.search_c=-1.0 cannot be: it must be 0 or more."),
        (["rollout=tree_rl", "rollout.keep_leaves=6"], True, "a tree grows 5 trajectories only"),
        (["rollout=tree_rl", "rollout.max_turn_tokens=1"], True, "leaves no token behind the first"),
        (["rollout=spo_tree", "rollout.segment_branches=[]"], True, "each depth needs branches"),
        (["rollout=spo_tree", "rollout.segment_branches=[2,0]"], True, "each depth needs branches"),
        (["rollout=spo_tree"], False, "cut a turn at token 132 last"),
        (["rollout=tree_po", "rollout.segment_first_max=1"], True, "is less than the 2 branches"),
        (
            ["rollout=tree_po", "rollout.segment_leaves=0", "rollout.max_turn_tokens=9999"],
            False,
            "rollout.segment_first_max=8 changes nothing",
        ),
        ([*SLATE, "rollout.num_candidates=1"], False, "gives rollout.expander=comb one candidate"),
        (["rollout=mcts", "rollout.judge=progress", "rollout.max_forks=1"], False, "one candidate of each step"),
        (["rollout=mcts"], True, "rollout.judge names none: it would take the first ones"),
        (["rollout=tree_scored"], True, "rollout.judge names none"),
        (["rollout=chains", "rollout.judge=progress"], False, 'rollout.judge="progress" is never asked'),
        (["rollout=mcts", "rollout.judge=progres"], True, "is no source; rewards.sources has "),
        (["rollout=mcts", "rollout.judge=answer"], True, 'rollout.judge="answer" scores each trajectory'),
        (["rollout=slate", "credit=grpo"], False, "no term of credit compares siblings"),
        (["rollout=chains", "rollout.max_nodes=9"], False, "rollout.max_nodes=9 changes nothing"),
        (["rollout=mcts", "rollout.judge=progress", "rollout.max_nodes=4"], True, "does not hold the first 5 steps"),
    ],
)
def test_what_cannot_work_is_told(overrides: list[str], fatal: bool, text: str):
    is_fatal, said = only(*overrides)
    assert text in said and is_fatal is fatal


@pytest.mark.parametrize(
    ("group", "num"),
    [
        ("chains", 8),
        ("tree_grpo", 6),
        ("tree_rl", 30),
        ("spo_tree", 216),
        ("tree_po", 16),
        ("slate", 1),
        ("prm_beam", 4),
        ("mcts", None),
    ],
)
def test_trajectories_of_a_prompt(group: str, num: int | None):
    assert most_trajectories(compose(["experiment=hop_search", f"rollout={group}"]).rollout) == num
