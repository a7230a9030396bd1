"""Shipped methods that pay steps pass the checks and warn of their own traps; terms that cannot work are refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from conf.check_credit import term_faults
from conf.checks import problems
from conf.compose import compose
from conf.keys import CONFIG_DIR
from conf.schema import Config, CreditConfig, CriticKind, ExpanderKind, Level, SourceConfig

STEP_SIGNALS = ("judge", "value", "match", "prm", "implicit", "contribution", "step")
TRAJECTORY_SIGNALS = ("outcome", "arena")


@pytest.fixture(scope="module")
def composed() -> Config:
    return compose(["experiment=hop_search", "rollout.num_workers=1"])


def credit(*layers: Any) -> CreditConfig:
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CreditConfig), *layers))
    assert isinstance(cfg, CreditConfig)
    return cfg


def shipped(name: str, **changes: Any) -> CreditConfig:
    return credit(OmegaConf.load(CONFIG_DIR / f"credit/{name}.yaml"), changes)


def fed(composed: Config, cfg: CreditConfig, *, forks: int = 4) -> Config:
    """A run with that credit and a source for each signal it reads, on a tree with so many forks."""
    run = copy.deepcopy(composed)
    run.credit = cfg
    run.rollout.expander, run.rollout.max_forks = ExpanderKind.beam_forks, forks
    read = {signal for term in cfg.terms.values() for signal in term.signals} | set(cfg.gae.signals)
    run.rewards.sources = {"answer": SourceConfig(fn="rewards.sources.outcome:exact_match", weight=0.0)}
    for signal in read:
        level = Level.step if signal in STEP_SIGNALS else Level.trajectory
        fn = "rewards.sources.hop_search:progress" if level is Level.step else "rewards.sources.outcome:exact_match"
        run.rewards.sources[f"from_{signal}"] = SourceConfig(fn=fn, signal=signal)
    if cfg.gae.signals:
        run.loss.critic.kind = CriticKind.value_head
    return run


def warnings(run: Config) -> list[str]:
    return [problem.text for problem in problems(run) if not problem.fatal]


TRAPS = {
    "ppr": ["credit.gae.combine=renorm sums rewards that all have the sign of the outcome"],
    "slate": [],
    "tree_rl": [],
    "tree_po": [],
    "spo_tree": [],
    "vine_ppo": [],
    "tree_rpo": [],
    "gigpo": [],
    "arena_rl": [],
    "prorag": [],
    "match_tir": ["credit.terms.turn.scope=turn_index compares the trajectories that got so far"],
    "step_grpo": [],
    "grpo_process": ["credit.terms.process.compare=rewards subtracts a baseline from every reward"],
    "prime": ["credit.terms.process.compare=rewards subtracts a baseline from every reward"],
    "pure": ["credit.terms.process.compare=rewards subtracts a baseline from every reward"],
    "pav": [],
    "tp_grpo": [],
    "spa_rl": [],
    "vsrm": [],
}


@pytest.mark.parametrize("name", TRAPS)
def test_shipped_method_can_run_and_warns_of_its_own_traps_alone(composed: Config, name: str):
    run = fed(composed, shipped(name))
    assert [problem.text for problem in problems(run) if problem.fatal] == []
    found = [text for text in warnings(run) if text.startswith("credit.")]
    assert [text.startswith(start) for text, start in zip(found, TRAPS[name], strict=True)] == [True] * len(found)


@pytest.mark.parametrize(("name", "term"), [("slate", "candidates"), ("tree_rpo", "fork")])
def test_zscore_of_two_siblings_is_warned_of_unless_the_deviation_has_a_floor(composed: Config, name: str, term: str):
    assert any(
        f"credit.terms.{term} takes a z-score among siblings" in text
        for text in warnings(fed(composed, shipped(name), forks=2))
    )
    floored = shipped(name, terms={term: {"min_std": 0.1}})
    assert not any("z-score" in text for text in warnings(fed(composed, floored, forks=2)))


def test_padded_turns_are_not_warned_of(composed: Config):
    cfg = shipped("match_tir", terms={"turn": {"scope": "turn_index_padded"}})
    assert not any("turn_index" in text for text in warnings(fed(composed, cfg)))


def test_renorm_of_returns_without_a_critic_is_warned_of(composed: Config):
    term = {"level": "step", "signals": {"judge": {"shift": -1.0}, "outcome": {}}, "combine": "renorm"}
    returns = credit({"terms": {"steps": {**term, "returns": "to_go"}}})
    assert any("a right trajectory gains by every further step" in text for text in warnings(fed(composed, returns)))
    alone = credit({"terms": {"steps": term}})
    assert not any("renorm" in text for text in warnings(fed(composed, alone)))


@pytest.mark.parametrize(
    "cfg",
    [
        {"terms": {"x": {"level": "step", "signals": {"value": {"read": "difference"}}, "returns": "to_go"}}},
        {"terms": {"x": {"signals": {"value": {"read": "difference"}}, "returns": "broadcast"}}},
        {"gae": {"level": "step", "signals": {"value": {"read": "difference"}}}},
    ],
)
def test_progress_paid_as_a_reward_is_warned_of(composed: Config, cfg: dict[str, Any]):
    text = "differences telescope to the last value less the one before the step"
    assert any(text in warning for warning in warnings(fed(composed, credit(cfg))))


def test_step_signal_can_be_summed_over_a_trajectory_by_a_broadcast(composed: Config):
    term = {"signals": {"match": {}}}
    [refused] = [problem.text for problem in problems(fed(composed, credit({"terms": {"x": term}}))) if problem.fatal]
    assert 'names "match", which scores steps' in refused
    summed = credit({"terms": {"x": {**term, "returns": "broadcast"}}})
    assert [problem.text for problem in problems(fed(composed, summed)) if problem.fatal] == []


@pytest.mark.parametrize(("signal", "missing"), [("outcome", "steps"), ("judge", "whole trajectories")])
def test_combination_of_one_side_alone_is_refused(composed: Config, signal: str, missing: str):
    gate = credit({"terms": {"x": {"level": "step", "signals": {signal: {}}, "combine": "gate"}}})
    assert any(f"names none that scores {missing}" in problem.text for problem in problems(fed(composed, gate)))
    renorm = credit({"gae": {"level": "step", "signals": {signal: {}}, "combine": "renorm"}})
    assert any(f"names none that scores {missing}" in problem.text for problem in problems(fed(composed, renorm)))


def test_term_that_compares_with_a_critic_needs_one(composed: Config):
    term = {"level": "step", "signals": {"outcome": {}}, "scope": "critic", "normalizer": "center"}
    run = fed(composed, credit({"terms": {"x": term}}))
    assert any("scope=critic with loss.critic.kind=none" in problem.text for problem in problems(run))
    run.loss.critic.kind = CriticKind.value_head
    assert [problem.text for problem in problems(run) if problem.fatal] == []


def test_faults_of_terms_are_found_before_a_run_starts(composed: Config):
    cfg = credit({"terms": {"x": {"signals": {"outcome": {}}, "returns": "to_go"}}})
    [text] = term_faults(cfg)
    assert text.startswith("credit.terms.x.returns=to_go differs from step to step, but level=trajectory has one value")
    assert text in [problem.text for problem in problems(fed(composed, cfg)) if problem.fatal]


RECIPES = sorted((CONFIG_DIR / "credit").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_method_says_how_it_is_biased_and_has_a_row_in_the_docs(file: Path):
    head = file.read_text(encoding="utf-8")
    assert head.count("# Bias: ") == 1
    rows = (CONFIG_DIR.parent / "docs" / "credit.md").read_text(encoding="utf-8").splitlines()
    assert any(f"`{file.stem}`" in row for row in rows if row.startswith("|"))
    assert set(re.findall(r"arXiv (\d{4}\.\d{5})", head.split(":")[0])) <= set(
        re.findall(r"\d{4}\.\d{5}", "\n".join(rows))
    )
