"""Held-out success: one trajectory for each held-out prompt."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from conf.errors import RewardFailed
from conf.schema import Config, ExpanderKind, RolloutConfig
from rewards.types import ScoredTree
from rl.launch import Parts
from rollout.data import PromptSource
from rollout.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluation found."""

    success_share: float
    """Share of held-out prompts answered rightly."""
    num_prompts: int
    """Prompts that were scored; one whose world failed is not counted."""
    standard_error: float
    """Of the share, over prompts."""


def evaluation_rollout(cfg: Config) -> RolloutConfig:
    """How held-out prompts are answered: one trajectory each, at the evaluation's temperature."""
    return replace(
        cfg.rollout, expander=ExpanderKind.chains, num_leaves=1, temperature=cfg.run.eval_temperature, top_p=1.0
    )


def evaluate(cfg: Config, parts: Parts, source: PromptSource, num_prompts: int) -> Evaluation:
    """Answer the held-out prompts under the engines' present weights.

    The prompts and the seeds are the same each time, so two evaluations differ by the policy alone.
    """
    prompts = source.held_out(num_prompts)
    seed = derive_seed(cfg.seed, "evaluation")
    scored = parts.scoring.collect(parts.scoring.submit(parts.pool.grow(prompts, seed, evaluation_rollout(cfg))))
    return evaluation_of(scored)


def evaluation_of(scored: list[ScoredTree]) -> Evaluation:
    """Success over all scored trajectories: their first outcome source gives more than a half.

    Raises: RewardFailed when not one trajectory was scored.
    """
    successes = [success for tree in scored for success in successes_of(tree)]
    if not successes:
        raise RewardFailed(
            f"none of {len(scored)} held-out trajectories was scored: success is unknown, not 0. "
            "Look at the stop reasons and the failed scores in the run's logs/."
        )
    share = statistics.fmean(successes)
    return Evaluation(share, len(successes), (share * (1 - share) / len(successes)) ** 0.5)


def successes_of(scored: ScoredTree) -> list[bool]:
    """Whether each scored trajectory succeeded, by the first trajectory source of the config."""
    by_leaf = next(iter(scored.leaf_scores.values()), {})
    return [score.value > 0.5 for score in by_leaf.values() if score.is_scored]
