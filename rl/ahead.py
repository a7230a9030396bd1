"""Batches that grow ahead: while the learner is at one step, the engines are at the next ones."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rollout.patience import wait_for
from rollout.tree import Tree
from rollout.types import Prompt


@dataclass(kw_only=True, slots=True)
class Grown:
    """A batch whose trees have been, or are being, handed to the reward service."""

    step: int
    """That it is trained at."""
    prompts: list[Prompt] = field(default_factory=list)
    trees: dict[int, Tree] = field(default_factory=dict)
    """Those that have grown, by index of the prompt."""
    calls: dict[int, Any] = field(default_factory=dict)
    """Calls that score, by index of the prompt."""
    seconds: float = 0.0
    """Of growing it."""


Grow = Callable[[Grown], None]
"""Grows a batch, from its prompts to the last tree."""


class Ahead:
    """Grows batches in their order on a thread of its own, at most `depth` ahead of the step that trains.

    A batch that is trained at step s was begun when step s - depth had not been updated yet, or later, so that no token
    of it is more than `depth` versions older than the policy that learns from it. Which version sampled which step
    hangs on the clock: only depth 0, which needs no thread, repeats to the last bit.
    """

    def __init__(self, grow: Grow, first_step: int, depth: int) -> None:
        assert depth > 0, "nothing grows ahead of itself"
        self._grow = grow
        self._batches: dict[int, Grown] = {}
        """Begun and not yet trained, by step."""
        self._done: queue.SimpleQueue[Grown | BaseException] = queue.SimpleQueue()
        self._allowed = threading.Semaphore(depth + 1)
        self._growing = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first_step,), name="ahead", daemon=True)
        self._thread.start()

    def next(self, limit_s: float) -> Grown:
        """The next batch, once it has grown.

        Raises: WaitTimeout; whatever growing it raised.
        """

        def come(wait_s: float) -> Grown | BaseException | None:
            with contextlib.suppress(queue.Empty):
                return self._done.get(timeout=wait_s)

        found = wait_for(come, limit_s=limit_s, what="the next batch to grow")
        if isinstance(found, BaseException):
            raise found
        return found

    def advance(self) -> None:
        """The oldest batch has been trained: one more may grow."""
        self._batches.pop(min(self._batches))
        self._allowed.release()

    def in_flight(self) -> list[Grown]:
        """Batches that have begun to grow and are not trained yet, the oldest first; one of them may still grow."""
        return list(self._batches.values())

    @contextlib.contextmanager
    def paused(self, limit_s: float) -> Iterator[None]:
        """Nothing grows while this is entered, which waits for the batch that does.

        Raises: WaitTimeout.
        """

        def come(wait_s: float) -> bool | None:
            return self._growing.acquire(timeout=wait_s) or None

        wait_for(come, limit_s=limit_s, what="the batch that is growing, before the evaluation")
        try:
            yield
        finally:
            self._growing.release()

    def close(self) -> None:
        """Begin no further batch. One that grows is left to the engines, which end with the run."""
        self._closed.set()
        self._allowed.release()

    def _run(self, first_step: int) -> None:
        try:
            for step in itertools.count(first_step):
                self._allowed.acquire()  # until the learner has come so far; who waits for that is the main thread
                if self._closed.is_set():
                    return
                with self._growing:
                    batch = self._batches[step] = Grown(step=step)
                    self._grow(batch)
                    self._done.put(batch)
        except BaseException as error:  # told where the batch is asked for
            self._done.put(error)
