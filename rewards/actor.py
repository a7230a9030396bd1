"""The reward service as a Ray actor."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import ray

from conf.schema import RewardsConfig
from rewards.service import RewardService
from rewards.types import ScoredTree
from rollout.tree import Tree
from rollout.worker import send_output_to


@ray.remote
class RewardActor:
    """Carries a `RewardService`; trees sent at the same time are scored at the same time."""

    def __init__(self, cfg: RewardsConfig, columns: Collection[str] | None = None, log_path: str = ""):
        """As `RewardService`; what the process prints goes to the file `log_path`, where one is given."""
        if log_path:
            send_output_to(Path(log_path))
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
