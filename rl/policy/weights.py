"""Publishes the learner's weights to the engines, and makes sure they arrived."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from conf.errors import StaleWeights
from conf.schema import Config
from rl.policy.actor import LearnerGroup
from rollout.pool import RolloutPool
from rollout.seeds import derive_seed
from rollout.tree import Tree
from rollout.types import Sampling

SHARED_MEMORY = Path("/dev/shm")
CANARY_TOKENS = 16


class WeightPublisher:
    """Writes each version to memory shared on this machine and has every engine load it in place."""

    def __init__(self, cfg: Config, learner: LearnerGroup, pool: RolloutPool) -> None:
        self._cfg, self._learner, self._pool = cfg, learner, pool
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="grove-weights-", dir=parent))

    def publish(self, version: int, trees: Sequence[Tree]) -> dict[str, float]:
        """Bring every engine to `version` and compare it with the learner on contexts of `trees`.

        Returns: metrics. Raises: StaleWeights when an engine's log-probs differ from the learner's by more than
        learner.canary_max_logprob_gap on average; WaitTimeout.
        """
        started = time.monotonic()
        path = self._folder / f"version_{version}.safetensors"
        limit_s = self._cfg.learner.update_timeout_s
        calls = self._learner.save_weights(str(path))
        self._learner.answer(calls, limit_s=limit_s, what="the learner to write its weights")
        self._pool.load_weights(str(path), version)
        for older in self._folder.glob("version_*.safetensors"):
            if older != path:
                older.unlink()
        gap_nats = self._canary_gap_nats(version, trees)
        return {
            "weights/version": float(version),
            "weights/canary_gap_nats": gap_nats,
            "weights/sync_seconds": time.monotonic() - started,
        }

    def close(self) -> None:
        """Remove the published files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _canary_gap_nats(self, version: int, trees: Sequence[Tree]) -> float:
        """Largest over the engines of the mean |engine - learner| log-prob gap.

        The steps are sampled afresh behind contexts that were cached before the update, so that stale weights, a stale
        tied head and a stale prefix cache all show.
        """
        contexts = [deepest_context(tree) for tree in trees[: self._cfg.learner.canary_samples]]
        requests = [(each, self._canary_sampling(version, n, len(each))) for n, each in enumerate(contexts)]
        if not requests:
            return 0.0
        by_engine = self._pool.sample_everywhere(requests)
        sampled = [each for engine in by_engine for each in engine]
        served = min(each.version for each in sampled)
        if served != version:
            raise StaleWeights(
                f"an engine serves version {served} after version {version} was published: what it samples would be "
                "trained as if the newest policy had said it."
            )
        calls = self._learner.score([(each.context_ids, each.token_ids) for each in sampled])
        limit_s = self._cfg.learner.update_timeout_s
        scored = iter(self._learner.answer(calls, limit_s=limit_s, what="the learner to score the canary"))
        gap_nats = max(
            statistics.fmean(mean_gap(each.logprobs, next(scored)) for each in engine) for engine in by_engine
        )
        if not gap_nats <= self._cfg.learner.canary_max_logprob_gap:  # NaN is no agreement
            limit = self._cfg.learner.canary_max_logprob_gap
            raise StaleWeights(
                f"after weight update {version} an engine's log-probs differ from the learner's by {gap_nats:.4f} nats "
                f"on average, above learner.canary_max_logprob_gap={limit}: it samples from another policy than "
                "the one being trained. float32 agrees to 1e-5 and bfloat16 to about 0.03; a larger gap means that the "
                "update did not reach every layer (a tied head, a cache) of this model."
            )
        return gap_nats

    def _canary_sampling(self, version: int, number: int, context_length: int) -> Sampling:
        room = self._cfg.rollout.max_context_tokens - context_length
        seed = derive_seed(self._cfg.seed, "canary", version, number)
        return Sampling(max_tokens=min(CANARY_TOKENS, self._cfg.rollout.max_turn_tokens, room), seed=seed)


def deepest_context(tree: Tree) -> list[int]:
    """Context of the tree's deepest step: the longest prefix an engine may have cached."""
    deepest = max(range(len(tree.nodes)), key=tree.depth, default=None)
    return tree.path_ids(-1 if deepest is None else tree.nodes[deepest].parent)


def mean_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Mean absolute difference of two equally long lists of log-probs, in nats."""
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
