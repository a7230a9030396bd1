"""Processes that a deadline can really kill: where functions from a user's file run."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import re
import signal
import time
import weakref
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any

from conf.schema import RewardsConfig, SourceConfig
from rewards.base import Source
from rewards.types import Score
from rollout.tree import Tree

SECRET_NAME = re.compile(r"^AWS_|(^|_)(API_?)?(KEY|TOKEN|SECRET|CREDENTIAL)S?(_|$)|PASSWORD|PASSWD", re.IGNORECASE)
"""Environment variables that reward code does not see: a judge's prompt or a log line would give them away."""
READY = "ready"
"""What the child says between set-up and scoring, when the clock of scoring starts."""
ORPHAN_GRACE_S = 5.0
"""Past its limit by so much, a child ends itself: then nobody is left to kill it."""
Answer = tuple[dict[int, Score], float]
"""row -> score, and the seconds it took."""


class Sandbox:
    """Processes that score one (source, tree) at a time. A crash or a hang costs that one answer, never more."""

    def __init__(self, cfg: RewardsConfig):
        self._lanes = [_Lane(cfg) for _ in range(cfg.num_processes)]
        self._free: SimpleQueue[_Lane] = SimpleQueue()
        for lane in self._lanes:
            self._free.put(lane)
        # One thread waits on each process; a thread and not a task, so that the sandbox outlives an event loop.
        self._threads = ThreadPoolExecutor(cfg.num_processes, thread_name_prefix="reward")
        weakref.finalize(self, _kill_all, self._lanes)  # also when the program ends without close()

    @property
    def num_running(self) -> int:
        """Processes that are up; they start with the first tree that needs one."""
        return sum(lane.is_running for lane in self._lanes)

    async def score(self, source: Source, tree: Tree) -> Answer:
        """What `source` says of every row of `tree` it is asked about.

        Returns: the scores, all timed out or all failed where the process was killed or died, and the seconds it took.
        """
        if not source.rows(tree):
            return {}, 0.0
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, source, tree)

    def close(self) -> None:
        """Kill every process; what waits for a process is cancelled, what is being scored fails."""
        for wait in (False, True):  # again after the threads: one of them may just have started another process
            self._threads.shutdown(wait=wait, cancel_futures=True)
            _kill_all(self._lanes)

    def _ask(self, source: Source, tree: Tree) -> Answer:
        lane = self._free.get()
        try:
            return lane.ask(source, tree)
        finally:
            self._free.put(lane)


class _Lane:
    """One child process and the pipe to it; started when it is first needed, and again after it died."""

    def __init__(self, cfg: RewardsConfig):
        self._cfg = cfg
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def ask(self, source: Source, tree: Tree) -> Answer:
        """Score a tree in the child; blocks until it answered, died, or was killed for being late."""
        started = time.monotonic()
        try:
            pipe = self._live_pipe()
            pipe.send((source.name, source.cfg, tree))
            reply = _received(pipe, self._cfg.setup_timeout_s, f"setup_timeout_s={self._cfg.setup_timeout_s:g}")
            if reply == READY:
                started = time.monotonic()
                reply = _received(pipe, source.cfg.timeout_s, f"timeout_s={source.cfg.timeout_s:g}")
            scores = reply if isinstance(reply, dict) else _all_rows(source, tree, Score.failed(reply))
        except TimeoutError as late:
            self.kill()
            scores = _all_rows(source, tree, Score.timed_out(str(late)))
        except (EOFError, OSError):
            exit_code = self.kill()
            reason = "was stopped" if exit_code is None else f"died with exit code {exit_code}"
            scores = _all_rows(source, tree, Score.failed(f"its process {reason}"))
        except Exception as error:  # pickle raises whatever a column's own class raises; nothing was sent then
            scores = _all_rows(source, tree, Score.failed(f"the tree cannot be sent to its process: {error}"))
        return scores, time.monotonic() - started

    def kill(self) -> int | None:
        """End the child and all that it started; its exit code, None where there is no child."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.join(timeout=0.1)  # a child that just closed its pipe is about to leave an exit code of its own
        exit_code = process.exitcode
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
        return process.exitcode if exit_code is None else exit_code

    def _live_pipe(self) -> Connection:
        if self._pipe is None or not self.is_running:
            self.kill()
            # A spawned child, since a forked one would hold our locks, sockets and secrets.
            context = multiprocessing.get_context("spawn")
            self._pipe, child_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(child_end, tuple(self._cfg.pass_env)), name="reward")
            self._process.start()
            child_end.close()
        return self._pipe


def secret_names(names: Iterable[str], passed: Collection[str]) -> list[str]:
    """Environment variables that look like secrets and are not passed on purpose."""
    return [name for name in names if SECRET_NAME.search(name) and name not in passed]


def _received(pipe: Connection, limit_s: float, limit: str) -> Any:
    if not pipe.poll(limit_s):
        raise TimeoutError(f"no answer within {limit}; its process was killed")
    return pipe.recv()


def _all_rows(source: Source, tree: Tree, score: Score) -> dict[int, Score]:
    return dict.fromkeys(source.rows(tree), score)


def _kill_all(lanes: Iterable[_Lane]) -> None:
    for lane in lanes:
        lane.kill()


def _serve(pipe: Connection, passed: Collection[str]) -> None:
    """What the child does: score what comes until the parent is gone."""
    os.setsid()  # one group with whatever the user's code starts, so that all of it can be killed
    for name in secret_names(tuple(os.environ), passed):
        del os.environ[name]
    sources: dict[str, Source] = {}
    with asyncio.Runner() as runner, suppress(EOFError, OSError):
        while True:
            message = pipe.recv_bytes()
            try:
                source, tree = _set_up(message, sources)
                pipe.send(READY)
                reply = _scores(source, tree, runner)
            except BaseException as error:  # also sys.exit and KeyboardInterrupt of the user's code: an answer is owed
                reply = f"{type(error).__name__}: {error}"
            pipe.send(reply)


def _set_up(message: bytes, sources: dict[str, Source]) -> tuple[Source, Tree]:
    request: tuple[str, SourceConfig, Tree] = pickle.loads(message)  # as Connection.recv does; our own parent wrote it
    name, cfg, tree = request
    if name not in sources:
        sources[name] = Source(name, cfg)  # kept: a class is made once, not once for each tree
    sources[name].set_up()
    return sources[name], tree


def _scores(source: Source, tree: Tree, runner: asyncio.Runner) -> dict[int, Score]:
    # SIGALRM's default action is the kernel's own: it ends even a child that hangs in C code and has lost its parent.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, source.cfg.timeout_s + ORPHAN_GRACE_S)
    try:
        return source.score_tree(tree, runner)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
