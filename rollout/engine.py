"""What an inference engine must do, whoever serves it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from torch import Tensor

from rollout.lines import Offer
from rollout.types import Sampled, Sampling

Groups = AsyncIterator[dict[str, Tensor]]
"""New weights: whole tensors on the CPU by their names on the hub, some at a time; not to be written to."""


class Engine(Protocol):
    """Samples steps behind a prefix of token ids and takes new weights in place."""

    @property
    def version(self) -> int:
        """Version of the weights it samples from; 0 before the first update."""
        ...

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        """Continue `context_ids` by one step. Siblings that share a prefix are computed behind one cached prefix."""
        ...

    async def load_weights(self, groups: Groups, version: int) -> None:
        """Take new weights of the same architecture in place, drop every cache they make stale, and wake up.

        Nothing is sampled from the first group on until all have come; where they end in an error, the engine waits for
        the next weights.
        """
        ...

    async def receive_weights(self, offer: Offer) -> None:
        """As `load_weights`, straight from the learner's lines.

        Raises: LineBroken, DamagedWeights.
        """
        ...

    async def sleep(self) -> None:
        """Give the GPU's memory to others until new weights come; nothing is being sampled."""
        ...

    async def close(self) -> None:
        """Stop, leaving no process and no shared memory behind."""
        ...
