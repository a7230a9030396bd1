"""Held-out evaluation: sample each held-out prompt, score what came of it, and say how sure one may be."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.checks import require_runnable
from conf.compose import compose, from_yaml
from conf.errors import CheckpointError, ConfigError
from conf.schema import Config, ExpanderKind, Level, RolloutConfig
from rewards.base import build_sources
from rl import checkpoint
from rl.checkpoint import Checkpoint
from rl.estimates import AnswerKey, Evaluation, chosen_by, default_ks, evaluation_of, numeric_key, text_key
from rl.launch import Parts, launched
from rl.model import resolve_model
from rl.outcomes import PromptOutcome, prompt_outcomes, write_outcomes
from rl.placement import LEARNING, Role
from rl.policy.written import MODEL, PRM
from rl.prm import prm_scored
from rl.run_folder import RunFolder, route_logs
from rollout.data import PromptSource, build_prompt_source
from rollout.seeds import derive_seed


def evaluation_rollout(cfg: Config) -> RolloutConfig:
    """How held-out prompts are answered: independent trajectories, at the evaluation's temperature."""
    return replace(
        cfg.rollout,
        expander=ExpanderKind.chains,
        num_leaves=cfg.run.eval_samples,
        temperature=cfg.run.eval_temperature,
        top_p=cfg.run.eval_top_p,
        batch_timeout_s=0.0,
    )


def evaluate(cfg: Config, parts: Parts, source: PromptSource, step: int = 0) -> list[PromptOutcome]:
    """Answer the held-out prompts under the engines' present weights.

    The prompts and the seeds are the same each time, so two evaluations differ by the policy alone.

    Args:
        step: that is finished, for the records of the run's own process reward model.
    """
    prompts = source.held_out(cfg.run.eval_prompts)
    seed = derive_seed(cfg.seed, "evaluation")
    trees = parts.pool.grow(prompts, seed, evaluation_rollout(cfg))
    scored = parts.scoring.collect(parts.scoring.submit(trees, evaluation_sources(cfg)))
    if parts.prm is not None and chooses_by_own_prm(cfg):
        scored = prm_scored(parts.prm, scored, cfg, updates=step)
    return prompt_outcomes(scored)


def chooses_by_own_prm(cfg: Config) -> bool:
    """Whether best of k goes by the process reward model that the run trains."""
    return bool(cfg.run.eval_score) and cfg.run.eval_samples > 1 and cfg.rewards.sources[cfg.run.eval_score].prm


def evaluation_sources(cfg: Config) -> list[str]:
    """Sources that score held-out trajectories: the one that success is read of, the one that best-of-k goes by, and
    those that ask nobody."""
    sources = build_sources(cfg.rewards)
    outcome = next((source for source in sources if source.level is Level.trajectory), None)
    wanted = {cfg.run.eval_score} if cfg.run.eval_samples > 1 else set()
    return [source.name for source in sources if source is outcome or source.name in wanted or not source.services]


def evaluation_under(cfg: Config, outcomes: list[PromptOutcome]) -> Evaluation:
    """What outcomes come to, by the settings of an evaluation.

    Raises: RewardFailed when not one trajectory was scored.
    """
    run = cfg.run
    score = chosen_by(run.eval_score, run.eval_score_fold) if run.eval_score else None
    seed = derive_seed(cfg.seed, "bootstrap")
    return evaluation_of(outcomes, run.eval_k or default_ks(run.eval_samples), score, _answer_key(cfg), seed)


def _answer_key(cfg: Config) -> AnswerKey:
    """Which answers are the same, as the source of success would have it."""
    outcome = next((source for source in build_sources(cfg.rewards) if source.level is Level.trajectory), None)
    return numeric_key if outcome is not None and outcome.spec.endswith("outcome:numeric_match") else text_key


def evaluation_metrics(found: Evaluation) -> dict[str, float]:
    """As metrics of a step (`rl.metrics`)."""
    success = found.estimates["success"]
    return {
        **{f"eval/{name}_share": estimate.value for name, estimate in found.estimates.items()},
        "eval/success_low_share": success.interval.low,
        "eval/success_high_share": success.interval.high,
        "eval/unknown_share": found.unknown_share,
        "eval/tokens_per_sample": found.mean_tokens,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """A run or a model that was evaluated by itself."""

    model: str
    """Folder of the weights."""
    cfg: Config
    found: Evaluation
    outcomes: Path | None
    """File of what each prompt came to; None where none was asked for."""
    seconds: float


def evaluate_run(path: str, overrides: list[str], out: str = "", config_dir: str = "") -> Evaluated:
    """Evaluate a run's newest checkpoint, or any Hugging Face model folder.

    Args:
        path: a run folder, or a model folder.
        overrides: changes to the run's own settings, or for a model folder the settings themselves.
        out: file for what each prompt came to; by default eval/alone_NNNNNN.jsonl in a run folder, none for a model.
        config_dir: the user's own groups, for a model folder.
    Raises: ConfigError, CheckpointError when there is nothing to evaluate; what an evaluation raises.
    """
    subject = _subject(Path(path), overrides, config_dir)
    cfg = subject.cfg
    require_runnable(cfg)
    with_prm = chooses_by_own_prm(cfg)
    if with_prm and not (subject.checkpoint and (subject.checkpoint.path / PRM).is_dir()):
        raise ConfigError(
            f"run.eval_score={cfg.run.eval_score} is the process reward model that a run trains beside its policy, "
            f'and "{path}" holds a policy alone. Give the folder of a run that trained one, or choose by another '
            "source with --score."
        )
    started = time.monotonic()
    from transformers import AutoTokenizer

    source = build_prompt_source(cfg, AutoTokenizer.from_pretrained(cfg.model.path))
    with tempfile.TemporaryDirectory(prefix="grove-eval-") as logs:
        put_back = route_logs(Path(logs))
        try:
            without = {Role.learner} if with_prm else LEARNING
            prm_path = resolve_model(subject.trained, lambda *_: None) if with_prm else ""
            with launched(cfg, cfg.model.path, Path(logs), without=without, prm_path=prm_path) as parts:
                outcomes = evaluate(cfg, parts, source, _restored(parts, subject.checkpoint))
        finally:
            put_back()
    written = Path(out) if out else subject.out
    if written is not None:
        write_outcomes(written, outcomes)
    return Evaluated(
        model=cfg.model.path,
        cfg=cfg,
        found=evaluation_under(cfg, outcomes),
        outcomes=written,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """What is evaluated by itself."""

    cfg: Config
    """Its run.dir is moved aside so that nothing is overwritten, and its model is the one that is evaluated."""
    trained: Config
    """As the run was trained."""
    checkpoint: Checkpoint | None
    """None for a model folder."""
    out: Path | None
    """Where outcomes go."""


def _restored(parts: Parts, found: Checkpoint | None) -> int:
    """Bring a process reward model that is there to a checkpoint. Returns: the checkpoint's step; 0 for none."""
    if found is None:
        return 0
    if parts.prm is not None:
        call = parts.prm.load(found.path.resolve())
        parts.prm.answer(call, "the process reward model to load its checkpoint")
    return found.step


def _subject(path: Path, overrides: list[str], config_dir: str) -> _Subject:
    newest = out = None
    if (path / "config.json").is_file():
        cfg, model = compose(overrides, config_dir), path
    elif RunFolder(path).config.is_file():
        cfg = from_yaml(RunFolder(path).config, overrides)
        newest = checkpoint.newest(RunFolder(path).checkpoints)
        if newest is None:
            raise CheckpointError(
                f"{path} holds no intact checkpoint: the run stopped before its first one. Train it further with "
                f"run.resume=true run.dir={path}, or evaluate a model folder."
            )
        model = newest.path / MODEL
        out = RunFolder(path).evaluations / f"alone_{newest.step:06d}.jsonl"
    else:
        raise ConfigError(
            f'"{path}" is neither a run folder (config.yaml and checkpoints/) nor a model folder (config.json): '
            "there is nothing to evaluate. Runs lie under runs/, one folder each."
        )
    if not cfg.run.eval_prompts:
        raise ConfigError("run.eval_prompts=0 evaluates nothing: give --prompts, e.g. --prompts 256.")
    run = replace(cfg.run, dir=str(path / "evaluation"), resume=False)
    its = replace(cfg, run=run, model=replace(cfg.model, path=str(model.resolve())))
    return _Subject(cfg=its, trained=cfg, checkpoint=newest, out=out)


def evaluation_json(done: Evaluated) -> dict[str, Any]:
    """Everything that was found, as plain values for scripts; what is not known is None."""
    found, spread = done.found, done.found.spread
    return {
        "model": done.model,
        "prompts": found.num_prompts,
        "samples": found.num_samples,
        "temperature": done.cfg.run.eval_temperature,
        "unknown": found.unknown,
        "success_share": found.success_share,
        "standard_error": found.standard_error if math.isfinite(found.standard_error) else None,
        "estimates": {
            name: {
                "value": each.value,
                "low": each.interval.low,
                "high": each.interval.high,
                "prompts": each.num_prompts,
            }
            for name, each in found.estimates.items()
        },
        "sample_correlation": spread.correlation if spread else None,
        "tokens_per_sample": found.mean_tokens,
        "detectable_difference": found.detectable_difference(done.cfg.run.eval_samples),
        "prompts_needed": [
            {"difference": row.difference, "samples": samples, "prompts": prompts}
            for row in found.power_table()
            for samples, prompts in row.prompts.items()
        ],
        "outcomes": str(done.outcomes) if done.outcomes else None,
        "seconds": done.seconds,
    }
