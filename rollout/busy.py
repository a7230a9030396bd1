"""How long a part of a run had something to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rollout.types import Sampled, Sampling

if TYPE_CHECKING:  # these load torch, and the reward service has a clock too
    from rollout.engine import Engine, Groups
    from rollout.lines import Offer


class BusyClock:
    """Runs while at least one piece of work is under way, however many there are side by side."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._running = 0
        self._since = self._total = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A piece of work, from its beginning to its end."""
        with self._lock:
            if not self._running:
                self._since = self._now()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._total += self._now() - self._since

    def seconds(self) -> float:
        """Of work so far, that which is under way included."""
        with self._lock:
            return self._total + (self._now() - self._since if self._running else 0.0)


class TimedEngine:
    """An engine whose clock runs while it samples or takes weights: not while its worker waits for a tool."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.clock = engine, BusyClock()

    @property
    def version(self) -> int:
        """As the engine's."""
        return self._engine.version

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        """As the engine's."""
        with self.clock.running():
            return await self._engine.sample(context_ids, sampling)

    async def load_weights(self, groups: Groups, version: int) -> None:
        """As the engine's."""
        with self.clock.running():
            await self._engine.load_weights(groups, version)

    async def receive_weights(self, offer: Offer) -> None:
        """As the engine's."""
        with self.clock.running():
            await self._engine.receive_weights(offer)

    async def sleep(self) -> None:
        """As the engine's."""
        await self._engine.sleep()

    async def close(self) -> None:
        """As the engine's."""
        await self._engine.close()
