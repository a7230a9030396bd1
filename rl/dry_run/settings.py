"""The settings of a dry run: the user's, with smaller numbers and stand-ins for what does not fit in a minute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from conf.reads import changed, excused, plain
from conf.schema import (
    ClusterConfig,
    Config,
    EngineKind,
    Layout,
    LearnerConfig,
    Level,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    SourceConfig,
    TaskConfig,
    TrackerConfig,
    TrackerMode,
)
from rl.dry_run.machines import DEFAULT

NUM_STEPS = 2
"""The first is checkpointed, the second is made once more after resuming from there."""
PROMPTS, LEAVES, STEPS, ROWS = 4, 4, 4, 1000
EVAL_PROMPTS = 2
STEP_SCORE, TRAJECTORY_SCORE = "rl.dry_run.scores:step_score", "rl.dry_run.scores:trajectory_score"
LIMIT_S = 120.0
"""Longest wait for a part to start or to answer: a dry run that hangs says so soon."""


def reduced(
    cfg: Config, scratch: Path, *, model: str, turn_tokens: int, engine: EngineKind, stands_in: Mapping[str, Level]
) -> Config:
    """The settings of the dry run.

    Args:
        cfg: the user's.
        scratch: folder that everything is written to.
        model: folder of the stand-in.
        turn_tokens: room that a turn needs for a call of a tool.
        engine: what samples.
        stands_in: what they score, by name, of the sources that get stand-in scores.
    """
    cfg = plain(cfg)
    lora = replace(cfg.model.lora, rank=min(cfg.model.lora.rank, 8))
    rollout = _rollout(cfg.rollout, turn_tokens, engine)
    return replace(
        cfg,
        run=_run(cfg.run, scratch),
        model=replace(cfg.model, path=model, dtype="float32", lora=lora),
        task=_task(cfg.task, scratch),
        rollout=rollout,
        rewards=_rewards(cfg.rewards, stands_in),
        select=replace(
            cfg.select, num_kept=min(cfg.select.num_kept, LEAVES // 2), max_refills=min(cfg.select.max_refills, 1)
        ),
        loss=replace(cfg.loss, critic=replace(cfg.loss.critic, path="", warmup_steps=0)),
        learner=_learner(cfg.learner, rollout.prompts_per_step),
        prm=replace(
            cfg.prm,
            path="",
            reference_path="",
            mini_batches=min(cfg.prm.mini_batches, rollout.prompts_per_step),
            epochs=min(cfg.prm.epochs, 1),
        ),
        cluster=ClusterConfig(object_store_mib=min(cfg.cluster.object_store_mib, 128)),
        tracker=TrackerConfig(mode=TrackerMode.disabled),
    )


def replaced_settings(cfg: Config, dry: Config) -> dict[str, tuple[str, str]]:
    """What the dry run changes: key -> (the user's value, its own), places of files left out."""
    ours, theirs = changed(dry), changed(cfg)
    every = {key: (theirs.get(key), ours.get(key)) for key in [*theirs, *ours]}
    return {
        key: (DEFAULT if before is None else _text(before), DEFAULT if after is None else _text(after))
        for key, (before, after) in every.items()
        if before != after and key not in PLACES and not key.startswith("rewards.sources.")
    }


def _text(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)


PLACES = ("run.dir", "model.path", "task.corpus.cache_dir", "task.textworld.cache_dir")
"""Settings that are moved into the dry run's own folder."""


def unexercised(cfg: Config, dry: Config, stands_in: Mapping[str, Level], asked: Mapping[str, bool]) -> dict[str, str]:
    """Settings whose reader the dry run replaces: key, or beginning of keys that ends in ".", and why.

    Args:
        asked: models under rewards.models that were asked all the same.
    """
    found = dict.fromkeys(excused(cfg), "no step reads it")
    found |= {"sweep.": "it is of several runs", "run.max_restarts": "it watches over the run"}
    found |= {
        "tracker.": "tracking is off",
        "cluster.": "a Ray of its own is started",
        "run.dir": "it writes elsewhere",
    }
    if not cfg.model.path:
        found["model.warm_start."] = "it comes before the run"
    if dry.rollout.engine is not cfg.rollout.engine:
        for name in ("kv_cache_mib", "engine_processes", "gpu_memory_share", "tensor_parallel_size"):
            found[f"rollout.{name}"] = "vLLM does not run here"
    found |= {f"rewards.sources.{name}.": "its scores are stand-ins" for name in stands_in}
    used = {source.model for source in cfg.rewards.sources.values()}
    found |= {
        f"rewards.models.{name}.": "it is not asked"
        for name in cfg.rewards.models
        if name in used and name not in asked
    }
    return found


def _run(run: RunConfig, scratch: Path) -> RunConfig:
    return replace(
        run,
        dir=str(scratch / "run"),
        num_steps=NUM_STEPS,
        max_generated_tokens=0,
        eval_prompts=min(run.eval_prompts, EVAL_PROMPTS),
        eval_samples=min(run.eval_samples, LEAVES),
        eval_k=[k for k in run.eval_k if k <= LEAVES],
        profile_steps=run.profile_steps and [1],
        checkpoint_every_steps=1,
        keep_checkpoints=max(run.keep_checkpoints, NUM_STEPS),
        record_every_steps=min(run.record_every_steps, 1),
        resume=False,
    )


def _task(task: TaskConfig, scratch: Path) -> TaskConfig:
    return replace(
        task,
        train=replace(task.train, max_rows=min(task.train.max_rows or ROWS, ROWS)),
        eval=replace(task.eval, max_rows=min(task.eval.max_rows or ROWS, ROWS)),
        textworld=replace(
            task.textworld, num_games=min(task.textworld.num_games, PROMPTS), cache_dir=str(scratch / "textworld")
        ),
        corpus=replace(task.corpus, cache_dir=str(scratch / "corpora")),
        # Arguments here are made up from schemas; what crashes on them is told, and does not end the dry run.
        max_tool_crashes_share=1.0,
    )


def _rollout(rollout: RolloutConfig, turn_tokens: int, engine: EngineKind) -> RolloutConfig:
    nodes, rounds = min(rollout.expand_nodes, 2), min(rollout.expand_rounds, 1)
    return replace(
        rollout,
        engine=engine,
        num_workers=1,
        prompts_per_step=min(rollout.prompts_per_step, PROMPTS),
        num_leaves=min(rollout.num_leaves, LEAVES),
        max_forks=min(rollout.max_forks, 2),
        num_trees=min(rollout.num_trees, 2),
        expand_nodes=nodes,
        expand_rounds=rounds,
        keep_leaves=min(rollout.keep_leaves, 1 + nodes * rounds),
        token_forks=min(rollout.token_forks, 2),
        segment_branches=[min(branches, 2) for branches in rollout.segment_branches],
        segment_leaves=min(rollout.segment_leaves, LEAVES),
        segment_first_max=min(rollout.segment_first_max, 2),
        num_candidates=min(rollout.num_candidates, 3),
        search_simulations=min(rollout.search_simulations, 6),
        max_nodes=min(rollout.max_nodes, 12),
        max_steps=min(rollout.max_steps, STEPS),
        max_turn_tokens=min(rollout.max_turn_tokens, turn_tokens),
        tree_timeout_s=min(rollout.tree_timeout_s, LIMIT_S),
        start_timeout_s=min(rollout.start_timeout_s, LIMIT_S),
        kv_cache_mib=min(rollout.kv_cache_mib, 256),
        tensor_parallel_size=1,
    )


def _rewards(rewards: RewardsConfig, stands_in: Mapping[str, Level]) -> RewardsConfig:
    sources = {
        name: _stand_in(source, stands_in[name]) if name in stands_in else source
        for name, source in rewards.sources.items()
    }
    return replace(rewards, sources=sources, num_processes=min(rewards.num_processes, 2), cache_path="")


def _stand_in(source: SourceConfig, level: Level) -> SourceConfig:
    return SourceConfig(
        fn=STEP_SCORE if level is Level.step else TRAJECTORY_SCORE,
        weight=source.weight,
        signal=source.signal,
        parts=source.parts,
        args={"parts": list(source.parts)} if source.parts else {},
    )


def _learner(learner: LearnerConfig, prompts: int) -> LearnerConfig:
    return replace(
        learner,
        mini_batches=min(learner.mini_batches, prompts),
        epochs=min(learner.epochs, 2),
        layout=Layout.auto if learner.layout in (Layout.flex, Layout.varlen) else learner.layout,
        num_processes=min(learner.num_processes, 2),
        weights_dtype="float32",
        offload=False,
        num_threads=min(learner.num_threads, 2),
        update_timeout_s=min(learner.update_timeout_s, LIMIT_S),
        canary_samples=min(learner.canary_samples, 2),
    )
