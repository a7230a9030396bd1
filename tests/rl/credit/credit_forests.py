"""The two trees of the golden vectors, the shipped recipes, and results by the names of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from conf.schema import CreditConfig
from rewards.drawn import parse_scored, row_of
from rewards.types import ScoredTree
from rl.credit.assign import Credit, assign
from rl.credit.forest import Forest, forest_of
from rl.credit.measured import Measured, with_measured

RECIPES = Path(__file__).parents[3] / "conf" / "credit"
MAX_STEPS = 4

T1 = "prompt -> (a -> (a1, a2), b -> (b1, b2))"
T1_OUTCOMES = {"a1": 1.0, "a2": 0.0, "b1": 0.0, "b2": 0.0}
T2 = "prompt -> (p, q -> (q1, q2), r -> r1 -> r2)"
T2_OUTCOMES = {"p": 1.0, "q1": 1.0, "q2": 0.0, "r2": 1.0}


def balanced(**arguments: Any) -> ScoredTree:
    """T1: two first steps with two leaves each; only a1 is right."""
    return parse_scored(T1, **{"outcomes": T1_OUTCOMES, **arguments})


def ragged(**arguments: Any) -> ScoredTree:
    """T2: three first steps with one, two and one leaf, at depths 1, 2 and 3; only q2 is wrong."""
    return parse_scored(T2, **{"outcomes": T2_OUTCOMES, **arguments})


def credit_of(cfg: CreditConfig, *scored: ScoredTree, max_steps: int = MAX_STEPS) -> tuple[Forest, Credit]:
    forest = forest_of(list(scored))
    return forest, assign(forest, cfg, max_steps)


def measured_credit(
    cfg: CreditConfig,
    *scored: ScoredTree,
    values: Mapping[str, Sequence[float]] | None = None,
    kl: Mapping[str, float] | None = None,
) -> tuple[Forest, Credit]:
    """As `credit_of`, with the critic's values of each step's tokens and each step's KL, by name; 0 where absent."""
    forest = with_measured(forest_of(list(scored)), [measured(each, values, kl) for each in scored])
    return forest, assign(forest, cfg, MAX_STEPS)


def measured(
    scored: ScoredTree, values: Mapping[str, Sequence[float]] | None, kl: Mapping[str, float] | None
) -> Measured:
    nodes = scored.tree.nodes
    return Measured(
        kl=None if kl is None else [kl.get(node.action_text, 0.0) for node in nodes],
        value=None
        if values is None
        else [list(values.get(node.action_text, [0.0] * len(node.action_ids))) for node in nodes],
    )


def with_lengths(scored: ScoredTree, lengths: Mapping[str, int]) -> ScoredTree:
    """The same tree with so many sampled tokens in the steps that are named."""
    for name, length in lengths.items():
        node = scored.tree.nodes[row_of(scored.tree, name)]
        node.action_ids, node.action_logprobs = [10] * length, [-1.0] * length
    return scored


def per_token(forest: Forest, credit: Credit, *scored: ScoredTree) -> dict[str, list[float]]:
    """name of the step -> the critic's advantage at each of its tokens."""
    assert credit.critic is not None
    extra, node_names = credit.critic.by_node(credit.critic.extra_T), names(list(scored), forest)
    advantages = zip(node_names, credit.critic.advantage_N.tolist(), extra, strict=True)
    return {name: [advantage + each for each in beyond] for name, advantage, beyond in advantages}


def recipe(name: str, **changes: Any) -> CreditConfig:
    """A shipped recipe; `changes` are merged into it as an experiment's YAML would be."""
    return credit_config(OmegaConf.load(RECIPES / f"{name}.yaml"), changes)


def credit_config(*layers: Any) -> CreditConfig:
    """The record that YAML layers make on top of the schema's defaults."""
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CreditConfig), *layers))
    assert isinstance(cfg, CreditConfig)
    return cfg


def names(scored: list[ScoredTree], forest: Forest) -> list[str]:
    """Name of each node of the forest."""
    places = zip(forest.prompt_N.tolist(), forest.row_N.tolist(), strict=True)
    return [scored[prompt].tree.nodes[row].action_text for prompt, row in places]


def per_node(forest: Forest, value_N: Tensor, *scored: ScoredTree) -> dict[str, float]:
    """name of the step -> value."""
    return dict(zip(names(list(scored), forest), value_N.tolist(), strict=True))


def per_leaf(forest: Forest, value_L: Tensor, *scored: ScoredTree) -> dict[str, float]:
    """name of the leaf -> value."""
    node_names = names(list(scored), forest)
    return {node_names[node]: value for node, value in zip(forest.leaf_node_L.tolist(), value_L.tolist(), strict=True)}


def per_pair(forest: Forest, value_P: Tensor, *scored: ScoredTree) -> dict[tuple[str, str], float]:
    """(name of the leaf, name of the step) -> value."""
    node_names = names(list(scored), forest)
    leaf_names = [node_names[node] for node in forest.leaf_node_L.tolist()]
    pairs = zip(forest.pair_leaf_P.tolist(), forest.pair_node_P.tolist(), value_P.tolist(), strict=True)
    return {(leaf_names[leaf], node_names[node]): value for leaf, node, value in pairs}
