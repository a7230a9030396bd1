"""Held-out success: one trajectory for each held-out prompt."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.checks import require_runnable
from conf.compose import compose, from_yaml
from conf.errors import CheckpointError, ConfigError, RewardFailed
from conf.schema import Config, ExpanderKind, Level, RolloutConfig
from rewards.base import build_sources
from rewards.types import ScoredTree
from rl import checkpoint
from rl.launch import Parts, launched
from rl.policy.stored import MODEL
from rl.run_folder import RunFolder, route_logs
from rollout.data import PromptSource, build_prompt_source
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
        cfg.rollout,
        expander=ExpanderKind.chains,
        num_leaves=1,
        temperature=cfg.run.eval_temperature,
        top_p=1.0,
        batch_timeout_s=0.0,
    )


def evaluate(cfg: Config, parts: Parts, source: PromptSource, num_prompts: int) -> Evaluation:
    """Answer the held-out prompts under the engines' present weights.

    The prompts and the seeds are the same each time, so two evaluations differ by the policy alone.
    """
    prompts = source.held_out(num_prompts)
    seed = derive_seed(cfg.seed, "evaluation")
    trees = parts.pool.grow(prompts, seed, evaluation_rollout(cfg))
    return evaluation_of(parts.scoring.collect(parts.scoring.submit(trees, evaluation_sources(cfg))))


def evaluation_sources(cfg: Config) -> list[str]:
    """Sources that score held-out trajectories: the one that success is read of, and those that ask nobody."""
    sources = build_sources(cfg.rewards)
    outcome = next((source for source in sources if source.level is Level.trajectory), None)
    return [source.name for source in sources if source is outcome or not source.services]


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


def evaluate_run(path: str, overrides: list[str], num_prompts: int | None) -> dict[str, Any]:
    """Held-out success of a run's newest checkpoint, or of any Hugging Face model folder.

    Args:
        path: a run folder, or a model folder.
        overrides: changes to the run's own settings, or for a model folder the settings themselves.
        num_prompts: run.eval_prompts by default.
    Returns: success_share, standard_error, prompts, model, seconds.
    Raises: ConfigError, CheckpointError when there is nothing to evaluate; what an evaluation raises.
    """
    cfg = _evaluation_config(Path(path), overrides)
    require_runnable(cfg)
    started = time.monotonic()
    from transformers import AutoTokenizer

    source = build_prompt_source(cfg, AutoTokenizer.from_pretrained(cfg.model.path))
    with tempfile.TemporaryDirectory(prefix="grove-eval-") as logs:
        put_back = route_logs(Path(logs))
        try:
            with launched(cfg, cfg.model.path, Path(logs), with_learner=False) as parts:
                found = evaluate(cfg, parts, source, num_prompts or cfg.run.eval_prompts)
        finally:
            put_back()
    return {
        "success_share": found.success_share,
        "standard_error": found.standard_error,
        "prompts": found.num_prompts,
        "model": cfg.model.path,
        "seconds": time.monotonic() - started,
    }


def _evaluation_config(path: Path, overrides: list[str]) -> Config:
    """The settings to evaluate with; run.dir is moved aside so that nothing of the run is touched."""
    if (path / "config.json").is_file():
        cfg, model = compose(overrides), path
    elif RunFolder(path).config.is_file():
        cfg = from_yaml(RunFolder(path).config, overrides)
        newest = checkpoint.newest(RunFolder(path).checkpoints)
        if newest is None:
            raise CheckpointError(
                f"{path} holds no intact checkpoint: the run stopped before its first one. Train it further with "
                f"run.resume=true run.dir={path}, or evaluate a model folder."
            )
        model = newest.path / MODEL
    else:
        raise ConfigError(
            f'"{path}" is neither a run folder (config.yaml and checkpoints/) nor a model folder (config.json): '
            "there is nothing to evaluate. Runs lie under runs/, one folder each."
        )
    run = replace(cfg.run, dir=str(path / "evaluation"), resume=False)
    return replace(cfg, run=run, model=replace(cfg.model, path=str(model.resolve())))
