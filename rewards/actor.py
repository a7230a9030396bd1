"""The reward service as a Ray actor."""

from __future__ import annotations

from collections.abc import Collection

import ray

from conf.schema import RewardsConfig
from rewards.service import RewardService
from rewards.types import ScoredTree
from rollout.tree import Tree


@ray.remote
class RewardActor:
    """Carries a `RewardService`; trees sent at the same time are scored at the same time."""

    def __init__(self, cfg: RewardsConfig, columns: Collection[str] | None = None):
        self._service = RewardService(cfg, columns)

    async def score(self, tree: Tree) -> ScoredTree:
        """Score one tree."""
        return await self._service.score(tree)

    async def ping(self) -> bool:
        """True: the actor is up and its sources are loaded."""
        return True

    async def close(self) -> None:
        """Stop the reward processes."""
        self._service.close()
