"""The same advantages through Grove as verl's advantage functions and TRL's GRPO trainer gave, on random groups.

`tests/golden/record_verl_advantages.py` and `record_trl_advantages.py` made them; their headings say how to run them.
Every trajectory is a chain of steps here, and its advantage the same at all its tokens, as it is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from credit_forests import credit_config, recipe

from conf.schema import CreditConfig
from rewards.types import Score, ScoredTree
from rl.credit.assign import assign
from rl.credit.forest import Forest, forest_of
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

GOLDEN = Path(__file__).parents[2] / "golden"
VERL = json.loads((GOLDEN / "verl_advantages.json").read_text(encoding="utf-8"))
TRL = json.loads((GOLDEN / "trl_advantages.json").read_text(encoding="utf-8"))

ALONE_IS_RAW = {"trajectory": {"singleton": "raw"}}
"""verl's advantage of a trajectory that is alone is its reward, a gradient towards whatever was sampled; ours is 0."""


def verl_config(case: dict[str, Any]) -> CreditConfig:
    match case:
        case {"kind": "grpo", "norm_adv_by_std_in_grpo": False}:
            return recipe("dr_grpo", terms=ALONE_IS_RAW)
        case {"kind": "grpo" | "grpo_vectorized"}:
            return recipe("grpo", terms=ALONE_IS_RAW)
        case {"kind": "rloo"}:
            return without_kl("rloo", singleton="raw")
        case {"kind": "rloo_vectorized"}:  # unlike the other, it gives a trajectory that is alone 0
            return without_kl("rloo")
        case {"kind": "opo"}:
            return recipe("dr_grpo", terms={"trajectory": {"singleton": "raw", "token_weighted": True}})
        case {"kind": "reinforce_plus_plus"}:
            return without_kl("reinforce_pp")
        case {"kind": "reinforce_plus_plus_baseline"}:
            return recipe("reinforce_pp_baseline", terms=ALONE_IS_RAW)
        case {"kind": "gdpo"}:
            return recipe("gdpo", terms={"outcome": {"singleton": "raw"}, "length": {"singleton": "raw"}})
        case {"kind": "gae", "gamma": gamma, "lam": lam}:
            return recipe("gae", gae={"gamma": gamma, "lam": lam})
    raise AssertionError(f"no recipe for {case['kind']}")


def without_kl(name: str, **changes: Any) -> CreditConfig:
    cfg = recipe(name)
    (term,) = cfg.terms.values()
    del term.signals["path_kl"]
    return credit_config(cfg, {"terms": {"trajectory": changes}})


@pytest.mark.parametrize("case", VERL["cases"], ids=lambda case: " ".join(map(str, list(case.values())[:-1])))
def test_verl_gives_the_same(case: dict[str, Any]):
    forest = chains(VERL["inputs"])
    credit = assign(forest, verl_config(case), max_steps=4)
    advantages = credit.advantage_N[forest.pair_node_P].repeat_interleave(forest.num_actions_N[forest.pair_node_P])
    if credit.critic is not None:
        advantages = advantages + credit.critic.extra_T  # in chains, nodes are in the order of pairs
    expected = [value for row in case["advantage"] for value in row]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def trl_config(case: dict[str, Any]) -> CreditConfig:
    signals = {{"reward": "outcome", "other_reward": "length"}[name]: {} for name in case["rewards"]}
    if case["multi_objective_aggregation"] == "normalize_then_sum":
        terms = {name: {"signals": {name: {}}, "eps": 1e-4} for name in signals}
        # TRL whitens over trajectories and not, as the paper and verl do, over tokens
        return credit_config({"terms": terms})
    normalizer = {"group": "zscore", "batch": "center_batch_std", "none": "center"}[case["scale_rewards"]]
    return credit_config({"terms": {"trajectory": {"signals": signals, "normalizer": normalizer, "eps": 1e-4}}})


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: " ".join(map(str, list(case.values())[:-1])))
def test_trl_gives_the_same(case: dict[str, Any]):
    inputs, chosen = TRL["inputs"], [group in TRL["groups"] for group in TRL["inputs"]["prompt"]]
    forest = chains(
        {name: [item for item, kept in zip(rows, chosen, strict=True) if kept] for name, rows in inputs.items()}
    )
    advantage_P = assign(forest, trl_config(case), max_steps=4).advantage_P.double()
    first_P = torch.cat([torch.tensor([True]), forest.pair_leaf_P.diff() > 0])
    advantage_L = advantage_P[first_P]
    if case["multi_objective_aggregation"] == "normalize_then_sum":
        advantage_L = (advantage_L - advantage_L.mean()) / (advantage_L.std() + 1e-4)
    assert advantage_L.tolist() == pytest.approx(case["advantage"], rel=1e-4, abs=1e-5)


def chains(inputs: dict[str, Any]) -> Forest:
    """Every trajectory a chain of steps, every prompt a tree; the critic's values as recorded."""
    trees: dict[int, ScoredTree] = {}
    rows = zip(inputs["prompt"], inputs["steps"], inputs["reward"], inputs["other_reward"], strict=True)
    for prompt, lengths, reward, other in rows:
        scored = trees.setdefault(prompt, empty(prompt))
        parent = ROOT
        for number, length in enumerate(lengths, start=1):
            parent = scored.tree.add(step(parent, length, is_last=number == len(lengths)))
        scored.leaf_signals["outcome"][parent] = Score(reward)
        scored.leaf_signals["length"][parent] = Score(other)
    forest = forest_of(list(trees.values()))
    forest.value_T = torch.tensor([value for row in inputs["value"] for value in row], dtype=torch.float64)
    return forest


def empty(prompt: int) -> ScoredTree:
    tree = Tree(prompt=Prompt(id=str(prompt), token_ids=(1,), question="", answer=""))
    return ScoredTree(tree=tree, leaf_signals={"outcome": {}, "length": {}})


def step(parent: int, length: int, *, is_last: bool) -> Node:
    return Node(
        parent=parent,
        action_ids=[2] * length,
        action_logprobs=[-1.0] * length,
        facts=StepFacts(kind=StepKind.answer if is_last else StepKind.call),
        stop=StopReason.answered if is_last else StopReason.continues,
        version=0,
    )
