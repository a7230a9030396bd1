"""Publishes the learner's weights to the engines, and makes sure they arrived."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence

from conf.errors import DamagedWeights, LineBroken, StaleWeights
from conf.schema import Config, Placement
from rl.line_plan import Ends
from rl.policy.actor import LearnerGroup
from rl.policy.lines import Lines
from rollout.pool import RolloutPool
from rollout.seeds import derive_seed
from rollout.tree import Tree
from rollout.types import Sampling

logger = logging.getLogger(__name__)

CANARY_TOKENS = 16
BROKEN_LIMIT = 3
"""Lines that broke as often in a row are no longer tried: each time costs up to cluster.weights_timeout_s."""


class WeightPublisher:
    """Has the learner's processes lay out each version in the memory of their nodes, and every engine take it; or send
    it to the engines straight.

    Args:
        ends: of the lines that cluster.weights asks for; None for the object store alone.
    """

    def __init__(self, cfg: Config, learner: LearnerGroup, pool: RolloutPool, ends: Ends | None = None) -> None:
        self._cfg, self._learner, self._pool = cfg, learner, pool
        self._lines = Lines(cfg, learner, pool, ends) if ends is not None else None
        self._num_broken = 0

    def make_room(self) -> None:
        """Before an update: where engines and learner take turns, engines sleep until the next version comes."""
        if self._cfg.cluster.placement is Placement.time_share:
            self._pool.sleep()

    def publish(self, version: int, trees: Sequence[Tree]) -> dict[str, float]:
        """Bring every engine to `version` and compare it with the learner on contexts of `trees`.

        Returns: metrics. Raises: StaleWeights when an engine's log-probs differ from the learner's by more than
        learner.canary_max_logprob_gap on average; DamagedWeights when they arrive
        otherwise than they were sent, twice; WaitTimeout.
        """
        started = time.monotonic()
        try:
            metrics = self._bring(version)
        except DamagedWeights as error:
            logger.warning("%s", error)
            metrics = self._bring(version)
        brought = time.monotonic()
        gap_nats = self._canary_gap_nats(version, trees)
        return metrics | {
            "weights/version": float(version),
            "weights/canary_gap_nats": gap_nats,
            "weights/canary_seconds": time.monotonic() - brought,
            "weights/sync_seconds": time.monotonic() - started,
        }

    def _bring(self, version: int) -> dict[str, float]:
        if self._lines is None:
            return self._by_store(version)
        try:
            metrics = self._lines.bring(version)
            self._num_broken = 0
            return metrics
        except LineBroken as error:
            logger.warning("%s; it goes by the object store", error)
        self._num_broken += 1
        if self._num_broken == BROKEN_LIMIT:
            logger.warning(
                "cluster.weights=%s broke %d times in a row: weights go by the object store from now on",
                self._cfg.cluster.weights.value, BROKEN_LIMIT,
            )  # fmt: skip
            self._lines = None
        return self._by_store(version)

    def _by_store(self, version: int) -> dict[str, float]:
        started = time.monotonic()
        published = self._learner.publish(version, limit_s=self._cfg.learner.update_timeout_s)
        lay_out_seconds = time.monotonic() - started
        arrivals = self._pool.load_weights(published)
        return {
            "weights/bytes": float(published.size_bytes),
            "weights/brought_bytes": float(published.size_bytes),
            "weights/lay_out_seconds": lay_out_seconds,
            "weights/fetch_seconds": max((each.fetch_seconds for each in arrivals), default=0.0),
            "weights/load_seconds": max((each.load_seconds for each in arrivals), default=0.0),
        }

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
