"""What the learner measures before credit is given: the KL to the reference, and the critic's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from conf.check_credit import PATH_KL, STEP_KL
from conf.errors import UnscoredNode
from conf.schema import CreditConfig, GaeLevel, Scope
from rl.credit.forest import Forest


@dataclass(kw_only=True, slots=True)
class Measured:
    """What the learner measured of one tree."""

    kl: list[float] | None = None
    """Per row: sum over its action tokens of log policy - log reference, in nats; NaN off the trained paths."""
    value: list[list[float]] | None = None
    """Per row and action token: the critic's value of the state before the token; [] off the trained paths."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What credit needs the learner to measure first."""

    kl: bool
    value: bool

    def __bool__(self) -> bool:
        return self.kl or self.value


def measurements_needed(cfg: CreditConfig) -> Needs:
    """What `with_measured` must bring before `assign` can give this credit."""
    has_gae = cfg.gae.level is not GaeLevel.off
    named = {signal for term in cfg.terms.values() for signal in term.signals}
    if has_gae:
        named |= cfg.gae.signals.keys()
    has_critic = has_gae or any(term.scope is Scope.critic for term in cfg.terms.values())
    return Needs(kl=bool(named & {STEP_KL, PATH_KL}), value=has_critic)


def with_measured(forest: Forest, measured: Sequence[Measured]) -> Forest:
    """The forest with what the learner measured: two more signals, and the critic's values.

    The step signal "kl" is the sum over a step's tokens of log policy - log reference, the k1 estimate; the trajectory
    signal "path_kl" is the sum of its steps'. A KL that is not finite counts as failed, so it trains nothing.

    Args:
        forest: of a batch of trees.
        measured: one per tree of the batch, all with the same parts.
    Raises: UnscoredNode when the critic's value of a trained step is not finite.
    """
    places = list(zip(forest.prompt_N.tolist(), forest.row_N.tolist(), strict=True))
    if any(each.kl is not None for each in measured):
        forest = _with_kl(forest, [_part(measured[tree].kl)[row] for tree, row in places])
    if any(each.value is not None for each in measured):
        forest = _with_values(forest, places, [_part(measured[tree].value)[row] for tree, row in places])
    return forest


def _part(part: list | None) -> list:
    assert part is not None, "the learner measures the same of every tree"
    return part


def _with_kl(forest: Forest, kl: list[float]) -> Forest:
    assert STEP_KL not in forest.step_signals and PATH_KL not in forest.leaf_signals, "no source feeds these signals"
    kl_N = torch.tensor(kl, dtype=torch.float64)
    kl_N = torch.where(kl_N.isfinite(), kl_N, torch.nan)
    path_kl_L = kl_N.new_zeros(len(forest.leaf_node_L)).index_add(0, forest.pair_leaf_P, kl_N[forest.pair_node_P])
    return replace(
        forest,
        step_signals={**forest.step_signals, STEP_KL: kl_N},
        step_failed={**forest.step_failed, STEP_KL: kl_N.isnan()},
        leaf_signals={**forest.leaf_signals, PATH_KL: path_kl_L},
    )


def _with_values(forest: Forest, places: list[tuple[int, int]], values: list[list[float]]) -> Forest:
    assert [len(each) for each in values] == forest.num_actions_N.tolist(), "one value per sampled token"
    value_T = torch.tensor([value for each in values for value in each], dtype=torch.float64)
    if not value_T.isfinite().all():
        wrong = int((~value_T.isfinite()).nonzero()[0, 0])
        tree, row = places[int(forest.num_actions_N.cumsum(0).gt(wrong).nonzero()[0, 0])]
        raise UnscoredNode(
            f"the critic says that step {row} of tree {tree} of the batch is worth {value_T[wrong].item()}: it has "
            f"diverged, and every advantage of the batch would be NaN. Go back to a checkpoint with a lower "
            f"loss.critic.learning_rate."
        )
    return replace(forest, value_T=value_T)
