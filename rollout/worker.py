"""The rollout worker: a thin Ray actor around an engine and an environment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray

from conf.errors import GroveError, LineBroken
from conf.schema import Config, EngineKind, RolloutConfig
from rollout.busy import BusyClock, TimedEngine
from rollout.engine import Engine
from rollout.expand import build_expander
from rollout.grow import complete_path, grow_tree
from rollout.lines import Offer
from rollout.process import begin_actor, engine_environment
from rollout.seeds import derive_seed
from rollout.shards import Arrival, Arriving, Published
from rollout.tree import Node, Tree
from rollout.types import Prompt, Sampled, Sampling

PIECE_LIMIT_S = 600.0
"""Longest wait for one piece of new weights."""


def build_engine(cfg: Config, model_path: str) -> Engine:
    """The engine that the config names; the choice imports only what it needs."""
    if cfg.rollout.engine is EngineKind.vllm:
        from rollout.vllm_engine import VllmEngine

        return VllmEngine(cfg, model_path)
    from rollout.hf_engine import TransformersEngine

    return TransformersEngine(cfg, model_path)


class ActorJudge:
    """A judge of growing trees (`rollout.expanders.base.Judge`) in another process: any actor with a method `judge`."""

    def __init__(self, actor: Any, source: str) -> None:
        self._actor, self._source = actor, source

    async def score(self, tree: Tree, rows: list[int]) -> list[float | None]:
        """What the actor's source says of `rows`; its own deadlines hold, and the tree's."""
        return await self._actor.judge.remote(self._source, tree, rows)


class RolloutWorker:
    """Carries one engine. Async methods run side by side on one event loop, so many trees grow at once."""

    def __init__(self, cfg: Config, model_path: str, log_path: str, judge_actor: Any = None) -> None:
        begin_actor(Path(log_path))
        self._cfg, self._model_path = cfg, model_path
        self._judge = ActorJudge(judge_actor, cfg.rollout.judge) if cfg.rollout.judge else None
        self._clock = BusyClock()

    async def start(self) -> None:
        """Load model, tokenizer and environment."""
        from transformers import AutoTokenizer

        from rollout.chat import build_environment

        self._tokenizer: Any = AutoTokenizer.from_pretrained(self._model_path)
        self._environment = build_environment(self._cfg, self._tokenizer)
        self._engine = TimedEngine(build_engine(self._cfg, self._model_path))

    async def grow(self, prompt: Prompt, rollout: RolloutConfig, seed: int) -> Tree:
        """Grow the tree of one prompt."""
        expander = build_expander(rollout, derive_seed(seed, "expander"), self._tokenizer.decode)
        with self._clock.running():
            return await grow_tree(prompt, self._engine, self._environment, expander, rollout, seed, self._judge)

    async def complete(self, prompt: Prompt, steps: list[Node], num: int, rollout: RolloutConfig, seed: int) -> Tree:
        """Go on from the end of a path, `num` times (`rollout.grow.complete_path`)."""
        with self._clock.running():
            return await complete_path(prompt, steps, num, self._engine, self._environment, rollout, seed)

    async def sample(self, requests: list[tuple[list[int], Sampling]]) -> list[Sampled]:
        """Sample single steps, for the canary."""
        with self._clock.running():
            return await asyncio.gather(*(self._engine.sample(context_ids, each) for context_ids, each in requests))

    async def load_weights(self, published: Published) -> Arrival:
        """Take new weights in place, and wake up with them.

        Raises: DamagedWeights when they did not arrive as they were sent; the engine then waits for others.
        """
        with self._clock.running():
            arriving = Arriving(published, _brought)
            async with contextlib.aclosing(arriving.tensors()) as groups:
                await self._engine.load_weights(groups, published.version)
            return arriving.arrival

    async def receive_weights(self, offer: Offer) -> Arrival:
        """As `load_weights`, straight from the learner's lines.

        Raises: LineBroken, DamagedWeights; the engine then waits for other weights.
        """
        started = time.monotonic()
        with self._clock.running():
            try:
                await self._engine.receive_weights(offer)
            except GroveError:
                raise
            except Exception as error:  # what an engine's own process raised comes here as words alone
                raise LineBroken(f"version {offer.version} was not taken ({type(error).__name__}: {error})") from error
        return Arrival(load_seconds=time.monotonic() - started)

    async def sleep(self) -> None:
        """Leave the GPU to others until new weights come."""
        await self._engine.sleep()

    async def busy_seconds(self) -> dict[str, float]:
        """Time with something to do so far: of the worker, and of its engine, which rests while a tool works."""
        return {"rollout": self._clock.seconds(), "engine": self._engine.clock.seconds()}

    async def pid(self) -> int:
        """Process id, for those who want to look or to kill."""
        return os.getpid()

    async def close(self) -> None:
        """Stop the engine and its processes."""
        await self._engine.close()


async def _brought(ref: Any) -> list[np.ndarray]:
    """The bytes of a piece, in memory that this node shares; another node's are copied here first."""
    async with asyncio.timeout(PIECE_LIMIT_S):
        return await ref


def start_worker(
    cfg: Config, model_path: str, log_path: str, *, place: Mapping[str, Any], judge_actor: Any = None
) -> Any:
    """A new worker actor, still loading.

    Args:
        place: options for Ray that bind it to a node, cores and GPUs; {} for one core anywhere.
        judge_actor: who is asked about growing trees where rollout.judge names a source.
    """
    environment = engine_environment(on_gpu=bool(place.get("num_gpus")))
    options: dict[str, Any] = {
        "num_cpus": 1,
        "max_concurrency": 1000,
        "max_restarts": 0,
        "runtime_env": {"env_vars": environment},
        **place,
    }
    return ray.remote(RolloutWorker).options(**options).remote(cfg, model_path, log_path, judge_actor)
