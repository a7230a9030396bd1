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
        lane, asked = self._free.get(), _Asked(request)
        try:
            for _ in range(MAX_PLAIN_TRIES):
                if not asked.left or not self._try(lane, source, asked):
                    break
        finally:
            self._free.put(lane)
        return asked.answers(), asked.seconds

    def _try(self, lane: Lane, source: Source, asked: _Asked) -> bool:
        """Ask what is left; returns whether another try may say more."""
        try:
            pending = lane.submit(asked.request(), {}, None)
            _result(pending.ready, self._cfg.setup_timeout_s, self._setup_limit)
        except ProcessDied as death:
            asked.reason = Score.failed(str(death))
            return True
        except TimeoutError as late:
            lane.kill()
            asked.reason = Score.timed_out(str(late))
            return False
        except Exception as error:  # pickle raises whatever a column's own class raises; nothing was sent then
            asked.reason = Score.failed(f"the tree cannot be sent to its process: {error}")
            return False
        started = time.monotonic()
        try:
            reply = _result(pending.answers, source.timeout_s, _limit(source))
            asked.is_told(_read(reply, asked.request(), started)[0])
            return False
        except TimeoutError as late:
            lane.kill()
            return asked.hung(pending.current(), Score.timed_out(str(late)))
        except ProcessDied as death:
            return asked.died(pending.current(), Score.failed(str(death)))
        finally:
            asked.seconds += time.monotonic() - started

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


class _Asked:
    """The calls of one tree to a plain function: what was said, and what is left to ask."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._said: dict[int, list[Score]] = {}
        self._died_in: int | None = None
        self.left = list(range(len(request.calls)))
        self.seconds = 0.0
        self.reason = Score.failed("no try was made")
        """Of what is left in the end."""

    def request(self) -> Request:
        """The calls that are left."""
        return replace(self._request, calls=tuple(self._request.calls[each] for each in self.left))

    def is_told(self, answers: Answers) -> None:
        """All that was left was answered."""
        self._said |= dict(zip(self.left, answers, strict=True))
        self.left = []

    def hung(self, place: int, reason: Score) -> bool:
        """The call at this place among those left hung. False for the second in a row that did: it hangs everywhere."""
        is_second = place == 0 and bool(self._said)
        self._lose(place, reason)
        return not is_second

    def died(self, place: int, reason: Score) -> bool:
        """The process died in this call, which is to blame when it happens there again: it may have been killed."""
        self.reason = reason
        if self._died_in == self.left[place]:
            self._lose(place, reason)
        else:
            self._died_in = self.left[place]
        return True

    def answers(self) -> Answers:
        """For each call; the reason for those that are left."""
        lost = {each: self._of_all_rows(each, self.reason) for each in self.left}
        return [(self._said | lost)[each] for each in range(len(self._request.calls))]

    def _lose(self, place: int, reason: Score) -> None:
        self.reason = reason
        call = self.left.pop(place)
        self._said[call] = self._of_all_rows(call, reason)

    def _of_all_rows(self, call: int, score: Score) -> list[Score]:
        return [score] * len(self._request.calls[call].rows)


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
