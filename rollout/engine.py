"""What an inference engine must do, whoever serves it."""

from __future__ import annotations

from typing import Protocol

from rollout.types import Sampled, Sampling


class Engine(Protocol):
    """Samples steps behind a prefix of token ids and takes new weights in place."""

    @property
    def version(self) -> int:
        """Version of the weights it samples from; 0 before the first update."""
        ...

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        """Continue `context_ids` by one step. Siblings that share a prefix are computed behind one cached prefix."""
        ...

    async def load_weights(self, path: str, version: int) -> None:
        """Load a safetensors file of the same architecture in place and drop every cache it makes stale."""
        ...

    async def close(self) -> None:
        """Stop, leaving no process and no shared memory behind."""
        ...
