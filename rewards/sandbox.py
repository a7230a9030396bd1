"""Where functions from a user's file run: processes that a deadline can really kill."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from conf.schema import RewardsConfig
from rewards.arguments import Call
from rewards.base import Answers, Source
from rewards.lane import GRACE_S, Lane, ProcessDied, Request
from rewards.types import Score
from rollout.tree import Tree

MAX_TRIES = 2
"""A process that died is asked once more: who killed it was often somebody else."""
MAX_PLAIN_TRIES = 4
"""Of a plain function with a tree: each may find one more step that hangs or kills, until the rest is given up."""


class Sandbox:
    """Processes that score. A crash or a hang costs that one answer, never more.

    A plain function has a process to itself while it scores a tree; an async one scores many trees at once in a process
    of its own source.
    """

    def __init__(self, cfg: RewardsConfig):
        self._cfg = cfg
        self._lanes = [Lane(cfg) for _ in range(cfg.num_processes)]
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in self._lanes:
            self._free.put(lane)
        self._of_source: dict[str, Lane] = {}
        # One thread waits on each process; a thread and not a task, so that the sandbox outlives an event loop.
        self._threads = ThreadPoolExecutor(cfg.num_processes, thread_name_prefix="reward")
        # also when the program ends without close()
        weakref.finalize(self, _close_all, self._lanes, self._of_source)

    @property
    def num_running(self) -> int:
        """Processes that are up; they start with the first tree that needs one."""
        return sum(lane.is_running for lane in [*self._lanes, *self._of_source.values()])

    async def answers(
        self, source: Source, tree: Tree, calls: Sequence[Call], services: Mapping[str, Any]
    ) -> tuple[Answers, float]:
        """What `source` says in each call; all timed out or all failed where its process was killed or died.

        Returns: the answers, and the seconds they took after set-up.
        """
        request = Request(source.name, source.cfg, tree, tuple(calls))
        if source.is_async:
            return await self._answers_of_async(source, request, services)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._answers_of_plain, source, request)

    def close(self) -> None:
        """Kill every process; what waits for a process is cancelled, what is being scored fails."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        _close_all(self._lanes, self._of_source)
        self._threads.shutdown(wait=True)

    def _answers_of_plain(self, source: Source, request: Request) -> tuple[Answers, float]:
        """All calls in one process; one that hangs or ends the process is left out and the others are asked again."""
        lane, seconds = self._free.get(), 0.0
        left, said = list(range(len(request.calls))), {}
        died_in: int | None = None
        reason = Score.failed("no try was made")
        try:
            for _ in range(MAX_PLAIN_TRIES):
                part = replace(request, calls=tuple(request.calls[each] for each in left))
                started = time.monotonic()
                try:
                    pending = lane.submit(part, {}, None)
                    _result(pending.ready, self._cfg.setup_timeout_s, self._setup_limit)
                except TimeoutError as late:
                    lane.kill()
                    reason = Score.timed_out(str(late))
                    break
                except ProcessDied as death:
                    reason = Score.failed(str(death))
                    continue
                except Exception as error:  # pickle raises whatever a column's own class raises; nothing was sent then
                    reason = Score.failed(f"the tree cannot be sent to its process: {error}")
                    break
                started = time.monotonic()
                try:
                    answers, _ = _read(_result(pending.answers, source.timeout_s, _limit(source)), part, started)
                    said |= dict(zip(left, answers, strict=True))
                    left = []
                    break
                except TimeoutError as late:
                    reason = Score.timed_out(str(late))
                    culprit = left.pop(pending.current())
                except ProcessDied as death:
                    reason = Score.failed(str(death))
                    culprit = left[pending.current()]
                    if culprit != died_in:  # who killed it was often somebody else
                        died_in = culprit
                        continue
                    left.remove(culprit)
                finally:
                    seconds += time.monotonic() - started
                    if left:
                        lane.kill()
                said[culprit] = [reason] * len(request.calls[culprit].rows)
                if not left:
                    break
        finally:
            self._free.put(lane)
        said |= {each: [reason] * len(request.calls[each].rows) for each in left}
        return [said[each] for each in range(len(request.calls))], seconds

    async def _answers_of_async(
        self, source: Source, request: Request, services: Mapping[str, Any]
    ) -> tuple[Answers, float]:
        lane = self._of_source.setdefault(source.name, Lane(self._cfg))
        loop, started = asyncio.get_running_loop(), time.monotonic()
        for number in range(1, MAX_TRIES + 1):
            try:
                pending = await loop.run_in_executor(None, lane.submit, request, services, loop)
                await _awaited(pending.ready, self._cfg.setup_timeout_s, self._setup_limit)
                started = time.monotonic()
                return _read(
                    await _awaited(pending.answers, source.timeout_s + GRACE_S, _limit(source)), request, started
                )
            except TimeoutError as late:  # the other trees in that process are asked once more
                await loop.run_in_executor(None, lane.kill)
                return _all(request, Score.timed_out(str(late)), started)
            except ProcessDied as death:
                if number == MAX_TRIES:
                    return _all(request, Score.failed(str(death)), started)
            except Exception as error:
                return _all(request, Score.failed(f"the tree cannot be sent to its process: {error}"), started)
        raise AssertionError("the last try returns")

    @property
    def _setup_limit(self) -> str:
        return f"setup_timeout_s={self._cfg.setup_timeout_s:g}"


def _close_all(lanes: list[Lane], of_source: dict[str, Lane]) -> None:
    for lane in [*lanes, *of_source.values()]:
        lane.close()


def _limit(source: Source) -> str:
    return f"timeout_s={source.timeout_s:g}"


def _late(limit: str) -> TimeoutError:
    return TimeoutError(f"no answer within {limit}; its process was killed")


def _result(future: Future[Any], limit_s: float, limit: str) -> Any:
    try:
        return future.result(limit_s)
    except TimeoutError as late:
        raise _late(limit) from late


async def _awaited(future: Future[Any], limit_s: float, limit: str) -> Any:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), limit_s)
    except TimeoutError as late:
        raise _late(limit) from late


def _read(reply: Answers | str, request: Request, started: float) -> tuple[Answers, float]:
    if isinstance(reply, str):
        return _all(request, Score.failed(reply), started)
    return reply, time.monotonic() - started


def _all(request: Request, score: Score, started: float) -> tuple[Answers, float]:
    return [[score] * len(call.rows) for call in request.calls], time.monotonic() - started
