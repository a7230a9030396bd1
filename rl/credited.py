"""From scored trees to credit: choose what trains, compare it, and leave out what then teaches nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from conf.schema import Config, CreditConfig
from rewards.types import ScoredTree
from rl.credit.assign import Credit, assign
from rl.credit.forest import Forest, forest_of
from rl.credit.measured import Measured, with_measured
from rl.credit.normalize import Moments
from rl.select import Selection, selected, without_silent_prompts
from rollout.tree import Tree

Measure = Callable[[list[Tree]], Sequence[Measured]]
"""Asks the learner what credit needs of trees, one answer a tree."""


@dataclass(frozen=True, slots=True)
class Credited:
    """A batch with the credit it trains on."""

    selection: Selection
    forest: Forest
    """Of selection.trees."""
    credit: Credit
    history: Mapping[str, Moments] | None = None
    """What running normalisers knew before it."""


def credited(
    scored: Sequence[ScoredTree],
    cfg: Config,
    measure: Measure | None = None,
    history: Mapping[str, Moments] | None = None,
) -> Credited:
    """Select trajectories, then give credit to those that are left; training and replay both come through here.

    Prompts without an advantage are found before the sum is whitened, and credit is given once more without them, so
    that they are in no mean and no deviation.

    Args:
        scored: the step's trees, blended.
        cfg: reads seed, select, credit and rollout.max_steps.
        measure: needed where `measurements_needed(cfg.credit)` is true.
        history: `credit.history` of the step before; None at the start.
    Raises: ConfigError, UnscoredNode: as `selected`, `assign` and `with_measured`.
    """
    selection = selected(scored, cfg.select, cfg.seed)
    measured = measure([each.tree for each in selection.trees]) if measure else []
    forest = with_measured(forest_of(selection.trees), measured)
    credit = assign(forest, cfg.credit, cfg.rollout.max_steps, history)
    if not cfg.select.drop_silent_prompts:
        return Credited(selection, forest, credit, history)
    plain = assign(forest, _unwhitened(cfg.credit), cfg.rollout.max_steps, history)
    selection = without_silent_prompts(selection, forest, plain)
    forest = with_measured(forest_of(selection.trees), measured)
    credit = assign(forest, cfg.credit, cfg.rollout.max_steps, history)
    return Credited(selection, forest, credit, history)


def _unwhitened(cfg: CreditConfig) -> CreditConfig:
    return replace(cfg, whiten=False, gae=replace(cfg.gae, whiten=False))
