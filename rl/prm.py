"""What the loop does with a process reward model of the run's own: its scores join the others, outcomes teach it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from conf.schema import Config, PrmKind
from rewards.blend import blend
from rewards.types import Cost, Origin, Score, ScoredTree
from rl.select import outcome
from rollout.tree import Tree

if TYPE_CHECKING:  # who plans placements comes here too
    from rl.policy.prm_actor import PrmHandle


def prm_source(cfg: Config) -> str:
    """Name of the source that carries the model's scores.

    Raises: StopIteration where the run has no such model.
    """
    return next(name for name, source in cfg.rewards.sources.items() if source.prm)


def has_prm(cfg: Config) -> bool:
    """Whether the run has a process reward model of its own."""
    return cfg.prm.kind is not PrmKind.none


def with_prm_scores(
    scored: Sequence[ScoredTree], said: Sequence[dict[int, float]], cfg: Config, *, updates: int, seconds: float
) -> list[ScoredTree]:
    """The trees with the model's score of each step, blended again.

    Args:
        said: row -> score, of each tree; one that is not finite failed.
        updates: batches the model has learnt from, its version.
        seconds: all of it took.
    """
    name = prm_source(cfg)
    origin = Origin(source=f"prm.kind={cfg.prm.kind.value}", version=str(updates), model=cfg.prm.path or "the policy")
    found = []
    for each, scores in zip(scored, said, strict=True):
        its = {row: _score(value) for row, value in sorted(scores.items())}
        cost = Cost(seconds=seconds / len(scored), calls=len(its))
        joined = replace(
            each,
            step_scores={**each.step_scores, name: its},
            origins={**each.origins, name: origin},
            costs={**each.costs, name: cost},
        )
        found.append(blend(joined, cfg.rewards))
    return found


def prm_scored(prm: PrmHandle, scored: Sequence[ScoredTree], cfg: Config, *, updates: int) -> list[ScoredTree]:
    """The trees, in their order, with the scores of the run's own model where they lack them.

    Args:
        updates: batches the model has learnt from.
    Raises: WorkerLost; WaitTimeout.
    """
    name = prm_source(cfg)
    new = [each for each in scored if name not in each.step_scores]
    started = time.monotonic()
    said = prm.answer(prm.score([each.tree for each in new]), "the process reward model to score")
    judged = iter(with_prm_scores(new, said, cfg, updates=updates, seconds=time.monotonic() - started))
    return [each if name in each.step_scores else next(judged) for each in scored]


def outcomes_of(scored: Sequence[ScoredTree]) -> tuple[list[Tree], list[dict[int, float]]]:
    """The trees, and row of a leaf -> what the first trajectory source says of it, where it says something."""
    outcomes: list[dict[int, float]] = []
    for each in scored:
        said = {leaf: outcome(each, leaf) for leaf in each.tree.trained_leaves()}
        outcomes.append({leaf: value for leaf, value in said.items() if value is not None})
    return [each.tree for each in scored], outcomes


def _score(value: float) -> Score:
    return Score(value) if math.isfinite(value) else Score.failed(f"the process reward model says {value}: it diverged")
