"""A circuit breaker: a server that answers nobody is not asked again until it has rested."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Breaker:
    """Closed, requests go out. Open, after `failures` lost in a row, none do for `rest_s`. Then half-open: one goes
    out, and what becomes of it closes or opens again. Safe to share between threads."""

    def __init__(self, failures: int, rest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: clock gives seconds that never run backwards."""
        self._failures, self._rest_s, self._clock = failures, rest_s, clock
        self._lock = threading.Lock()
        self._num_lost = 0
        self._rests_until: float | None = None
        self._is_probing = False

    def admit(self) -> bool:
        """Whether a request may go out. Each one that may is ended by `succeeded`, `failed` or `abandoned`."""
        with self._lock:
            if self._rests_until is None:
                return True
            if self._is_probing or self._clock() < self._rests_until:
                return False
            self._is_probing = True
            return True

    def succeeded(self) -> None:
        """A request was answered: whoever sent it and whenever, the server is there."""
        with self._lock:
            self._num_lost, self._rests_until, self._is_probing = 0, None, False

    def failed(self) -> None:
        """A request was lost."""
        with self._lock:
            self._num_lost += 1
            is_probe, self._is_probing = self._is_probing, False
            if is_probe or (self._rests_until is None and self._num_lost >= self._failures):
                self._rests_until = self._clock() + self._rest_s

    def abandoned(self) -> None:
        """Nobody waits for a request any more, so nothing was learnt of the server."""
        with self._lock:
            self._is_probing = False

    @property
    def is_open(self) -> bool:
        """Whether the server is resting or on trial."""
        return self._rests_until is not None

    @property
    def num_lost(self) -> int:
        """Requests lost since the last one that was answered."""
        return self._num_lost

    @property
    def rest_left_s(self) -> float:
        """Seconds until a request may be tried; 0 where one may."""
        return 0.0 if self._rests_until is None else max(self._rests_until - self._clock(), 0.0)
