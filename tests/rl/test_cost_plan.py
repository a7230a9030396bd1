from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import GO, FakeEngine, LetterEnvironment, prompt

from conf.schema import ExpanderKind, RolloutConfig
from rl.batch_metrics import rollout_metrics
from rl.plan import CHAINS, FORESEEN, LIMITS, MEASURED, cost_table, plan_text, write_plan
from rl.run_folder import RunFolder
from rollout.expand import build_expander
from rollout.grow import grow_tree
from rollout.tree import Tree

COMB = RolloutConfig(
    expander=ExpanderKind.comb, num_candidates=5, max_steps=4, max_turn_tokens=1, max_context_tokens=64
)


def grown(cfg: RolloutConfig, seed: int) -> Tree:
    """A tree whose trajectories have as many one-token turns as they may."""
    engine = FakeEngine(choose=lambda rng: GO)
    return asyncio.run(grow_tree(prompt(), engine, LetterEnvironment(), build_expander(cfg, seed), cfg, seed))


def rows(cfg: RolloutConfig) -> list[dict[str, float]]:
    """Two steps of two trees each."""
    return [rollout_metrics([grown(cfg, seed), grown(cfg, seed + 1)], 1.0) for seed in (0, 2)]


def test_a_run_says_at_its_beginning_what_a_tree_can_cost():
    # 5 candidates of 4 turns of 8 tokens for one trajectory of 32; the prompt of 60 tokens is read by 20 requests
    text = plan_text(replace(COMB, max_turn_tokens=8), prompt_tokens=60.0)
    assert "growing with comb, at the limits: a prompt has 1 trajectories of 20 steps and 160 generated tokens" in text
    # contexts: 5 times 60, 68, 76 and 84; the prompt is computed once
    assert "(5.00 of independent chains), 60 prefilled, 1,380 cached, 160 trained" in text


def test_a_search_says_how_far_it_may_go():
    search = RolloutConfig(expander=ExpanderKind.mcts, search_simulations=40, max_forks=5)
    assert plan_text(search, 60.0) == "growing with mcts: at most 200 steps a prompt, of up to 8 tokens"
    assert "as many steps as its text or its judge asks for" in plan_text(
        RolloutConfig(expander=ExpanderKind.best_first), 60.0
    )


def test_the_plan_is_kept_in_the_run_folder(tmp_path: Path):
    text = write_plan(COMB, [prompt(1, 2, 3), prompt(1)], RunFolder(tmp_path))
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["text"] == text
    assert kept[LIMITS]["prefilled"] == 2.0  # the mean of prompts of 3 and 1 tokens; replies are not known yet


@pytest.mark.parametrize("kind", [ExpanderKind.chains, ExpanderKind.comb, ExpanderKind.beam_forks])
def test_what_was_foreseen_stands_beside_what_was_measured(kind: ExpanderKind):
    cfg = replace(COMB, expander=kind, num_leaves=4)
    table = cost_table(cfg, rows(cfg))
    assert list(table) == [CHAINS, FORESEEN, MEASURED]
    foreseen, measured = table[FORESEEN], table[MEASURED]
    for part in ("trajectories", "steps", "generated"):
        assert measured[part] == foreseen[part]
    # the fake engine has no cache: all contexts count as computed
    assert measured["prefilled"] == foreseen["prefilled"] + foreseen["cached"]
    assert measured["trained"] == 0.0  # nobody learned


def test_independent_chains_compute_every_prompt_themselves():
    cfg = replace(COMB, expander=ExpanderKind.chains, num_leaves=4)
    table = cost_table(cfg, rows(cfg))
    # a prompt of 2 tokens and 3 replies of 1 token that another turn follows: a tree reads the prompt once
    assert table[FORESEEN]["prefilled"] == 2 + 4 * 3
    assert table[CHAINS]["prefilled"] == 4 * (2 + 3)
    assert table[CHAINS]["generated"] == table[FORESEEN]["generated"] == 16


def test_a_search_is_measured_against_chains_alone():
    cfg = replace(COMB, expander=ExpanderKind.mcts, search_simulations=3, max_forks=2, max_steps=2)
    assert list(cost_table(cfg, rows(cfg))) == [CHAINS, MEASURED]


def test_a_run_that_grew_nothing_has_no_table():
    assert cost_table(COMB, [{"step": 0, "eval/success_share": 0.5}]) == {}
