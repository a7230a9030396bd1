"""One process that runs reward functions, and the pipe to it: it can be killed, and what it holds goes with it."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from conf.schema import RewardsConfig, SourceConfig
from rewards.arguments import Call
from rewards.base import Answers, Source
from rewards.models.base import ModelError
from rollout.child import Output, kill_group, secret_names, set_limits
from rollout.tree import Tree

logger = logging.getLogger(__name__)

GRACE_S = 2.0
"""An async source cancels what is late by itself; past its limit by so much, something blocks its event loop."""
ORPHAN_GRACE_S = 5.0
"""Past its limit by so much, a child ends itself: then nobody is left to kill it."""
MAX_OUTPUT_BYTES = 256 * 1024
"""Of what a child prints between two requests."""


class ProcessDied(Exception):
    """The child is gone; the message says how."""


@dataclass(frozen=True, slots=True)
class Request:
    """Score some calls of a source about a tree."""

    name: str
    cfg: SourceConfig
    tree: Tree
    calls: tuple[Call, ...]


class Pending:
    """A request on its way."""

    def __init__(self, services: Mapping[str, Any], loop: asyncio.AbstractEventLoop | None) -> None:
        self.services, self.loop = services, loop
        self.ready: Future[None] = Future()
        """Done when set-up is and scoring begins."""
        self.answers: Future[Answers | str] = Future()
        """The answers, or why there are none. Raises ProcessDied."""
        self.current: Callable[[], int] = lambda: 0
        """Number of the call that a plain function is in."""


class Lane:
    """One child process; started when it is first needed, and again after it died."""

    def __init__(self, cfg: RewardsConfig) -> None:
        self._cfg = cfg
        self._child: _Child | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def is_running(self) -> bool:
        """Whether the child is up."""
        child = self._child
        return child is not None and child.is_running

    def submit(self, request: Request, services: Mapping[str, Any], loop: asyncio.AbstractEventLoop | None) -> Pending:
        """Send a request.

        Args:
            services: what answers when the function asks `model` or `engine`; loop: where it answers.
        Raises: what pickle raises when the tree cannot be sent; ProcessDied.
        """
        message = pickle.dumps((request, sorted(services)))
        with self._lock:
            if self._is_closed:
                raise ProcessDied("its process was stopped")
            if self._child is None or not self._child.is_running:
                self._child = _Child(self._cfg)
            child = self._child
        return child.submit(message, Pending(services, loop))  # not under the lock: `kill` must get by a full pipe

    def kill(self) -> None:
        """End the child and all that it started; what waits for it raises ProcessDied."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.kill()

    def close(self) -> None:
        """Kill it and start it no more."""
        with self._lock:
            self._is_closed = True
        self.kill()


class _Child:
    """The process, with a thread that reads what it says and one that reads what it prints."""

    def __init__(self, cfg: RewardsConfig) -> None:
        # A spawned child, since a forked one would hold our locks, sockets and secrets.
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        output, child_output = context.Pipe(duplex=False)
        self._pending: dict[int, Pending] = {}
        self._count = 0
        self._lock, self._reaping = threading.Lock(), threading.Lock()
        self._exit_code: int | None = None
        self._is_over = False
        """What is sent from now on is lost: whoever waited was told."""
        self._output = Output("a reward", MAX_OUTPUT_BYTES)
        self._current = context.RawValue("q", 0)
        arguments = (child_end, child_output, self._current, tuple(cfg.pass_env), cfg.memory_limit_mib)
        self._process: SpawnProcess = context.Process(target=_serve, args=arguments, name="reward")
        self._process.start()
        child_end.close()
        child_output.close()
        self._listener = threading.Thread(target=self._listen, name="reward pipe", daemon=True)
        self._listener.start()
        threading.Thread(target=self._copy_output, args=(output,), name="reward output", daemon=True).start()

    @property
    def is_running(self) -> bool:
        return not self._is_over

    def submit(self, message: bytes, pending: Pending) -> Pending:
        with self._lock:
            if self._is_over:
                raise ProcessDied(f"its process {_fate(self._exit_code)}")
            self._count += 1
            number = self._count
            self._pending[number] = pending
        self._output.renew()
        pending.current = lambda: self._current.value
        self._send(("score", number, message))
        return pending

    def kill(self) -> None:
        with self._reaping:
            if self._exit_code is None:
                self._strike()
        self._listener.join()

    def _send(self, message: Any) -> None:
        try:
            data = pickle.dumps(message)
            with self._lock:
                self._pipe.send_bytes(data)
        except OSError:
            pass  # the listener sees the end of the pipe too, and tells everyone

    def _listen(self) -> None:
        try:
            while True:
                self._hear(*self._pipe.recv())
        except (EOFError, OSError):
            pass  # it is gone
        except Exception as error:  # unpickling raises whatever it likes; who talks nonsense is taken for dead
            logger.warning("a reward process sent what cannot be read (%s: %s)", type(error).__name__, error)
        self._reap()
        with self._lock:
            self._is_over = True  # before anyone is told: they ask again at once, and it must be another process
            lost = list(self._pending.values())
            self._pipe.close()
        for pending in lost:
            for future in (pending.ready, pending.answers):
                with suppress(InvalidStateError):  # nobody waits for it any more
                    future.set_exception(ProcessDied(f"its process {_fate(self._exit_code)}"))

    def _hear(self, kind: str, number: int, content: Any) -> None:
        pending = self._pending.get(number)
        if pending is None:
            return
        if kind == "ask":
            self._ask(pending, *content)
            return
        if kind == "answers":
            del self._pending[number]
            _settle(pending.answers, content)
        _settle(pending.ready, None)

    def _reap(self) -> None:
        with self._reaping:
            # A child that just closed its pipe is about to leave an exit code of its own.
            self._process.join(timeout=0.5)
            self._strike()
            self._process.join()
            self._exit_code = self._process.exitcode
            self._process.close()

    def _strike(self) -> None:
        assert self._process.pid, "it was started"
        kill_group(self._process.pid)
        self._process.kill()  # it may not lead a group yet

    def _ask(self, pending: Pending, number: int, service: str, method: str, args: tuple, kwargs: dict) -> None:
        """Answer what a function asked of its model or engine, in the event loop that wants its score."""

        def tell(asked: Future[Any]) -> None:
            error = CancelledError("it was cancelled") if asked.cancelled() else asked.exception()
            if error is None:
                self._send(("told", number, (True, asked.result())))
            else:
                kind = "late" if isinstance(error, TimeoutError) else "failed"
                self._send(("told", number, (False, (kind, str(error) or type(error).__name__))))

        try:
            if method.startswith("_") or pending.loop is None:
                raise AttributeError(f"{service}.{method} is not to be asked")
            found: Coroutine[Any, Any, Any] = getattr(pending.services[service], method)(*args, **kwargs)
            asyncio.run_coroutine_threadsafe(found, pending.loop).add_done_callback(tell)
        except Exception as error:  # no such method, wrong arguments, a closed loop: the function's to know
            self._send(("told", number, (False, ("failed", f"{type(error).__name__}: {error}"))))

    def _copy_output(self, output: Connection) -> None:
        with output:
            self._output.copy(output.fileno())


def _settle(future: Future[Any], content: Any) -> None:
    with suppress(InvalidStateError):  # set before, or nobody waits for it any more
        future.set_result(content)


def _fate(exit_code: int | None) -> str:
    return "was killed" if exit_code == -signal.SIGKILL else f"died with exit code {exit_code}"


def _serve(pipe: Connection, output: Connection, current: Any, passed: Collection[str], memory_limit_mib: int) -> None:
    """What the child does: score what comes until the parent is gone."""
    os.setsid()  # one group with whatever the user's code starts, so that all of it can be killed
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    for name in secret_names(tuple(os.environ), passed):
        del os.environ[name]
    set_limits(memory_limit_mib)
    with asyncio.Runner() as runner, suppress(EOFError, OSError, KeyboardInterrupt):
        runner.run(_Server(pipe, current).run())
    os._exit(0)  # a thread of the user's code must not keep the process


class _Server:
    """The child's side of the pipe."""

    def __init__(self, pipe: Connection, current: Any) -> None:
        self._pipe, self._current = pipe, current
        self._sources: dict[str, Source] = {}
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._limits: list[float] = []

    async def run(self) -> None:
        """Serve until the pipe ends."""
        messages: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        threading.Thread(target=_read, args=(self._pipe, loop, messages), daemon=True).start()
        while True:
            kind, number, content = await messages.get()
            if kind == "told":
                self._tell(number, *content)
                continue
            task = asyncio.ensure_future(self._score(number, content))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _score(self, number: int, message: bytes) -> None:
        limit_s = 0.0
        try:
            request, services = pickle.loads(message)  # as Connection.recv does; our own parent wrote it
            self._starts(0)
            source = self._source(request)
            self._pipe.send(("ready", number, None))
            limit_s = source.timeout_s + ORPHAN_GRACE_S
            self._limits.append(limit_s)
            self._wind_up()
            remote = {name: _Remote(self, number, name) for name in services}
            reply: Answers | str = await source.answers(request.tree, request.calls, remote, self._starts)
        except BaseException as error:  # also sys.exit and KeyboardInterrupt of the user's code: an answer is owed
            reply = f"{type(error).__name__}: {error}"
        if limit_s:
            self._limits.remove(limit_s)
            self._wind_up()
        self._pipe.send(("answers", number, reply))

    def _source(self, request: Request) -> Source:
        source = self._sources.get(request.name)
        if source is None:  # kept: a class is made once, not once for each tree
            source = self._sources[request.name] = Source(request.name, request.cfg)
        source.set_up()
        return source

    def _starts(self, number: int) -> None:
        """Leave word of the call that begins, for whoever finds us hanging or dead."""
        self._current.value = number

    def _wind_up(self) -> None:
        """Set the alarm that ends a child whose event loop does not turn any more."""
        signal.setitimer(signal.ITIMER_REAL, max(self._limits, default=0.0))

    async def ask(self, request: int, service: str, method: str, args: tuple, kwargs: dict) -> Any:
        """What the parent's model or engine answers."""
        self._count += 1
        number = self._count
        self._asked[number] = asyncio.get_running_loop().create_future()
        self._pipe.send(("ask", request, (number, service, method, args, kwargs)))
        try:
            return await self._asked[number]
        finally:
            del self._asked[number]

    def _tell(self, number: int, is_answer: bool, content: Any) -> None:
        asked = self._asked.get(number)
        if asked is None or asked.done():
            return
        if is_answer:
            asked.set_result(content)
        else:
            kind, reason = content
            asked.set_exception(TimeoutError(reason) if kind == "late" else ModelError(reason))


class _Remote:
    """A model or an engine, as a function in the child sees it: every method is asked of the parent."""

    def __init__(self, server: _Server, request: int, service: str) -> None:
        self._server, self._request, self._service = server, request, service

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        def ask(*args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
            return self._server.ask(self._request, self._service, method, args, kwargs)

        return ask


def _read(pipe: Connection, loop: asyncio.AbstractEventLoop, messages: asyncio.Queue[Any]) -> None:
    try:
        while True:
            loop.call_soon_threadsafe(messages.put_nowait, pipe.recv())
    except (EOFError, OSError, RuntimeError):  # RuntimeError: the loop is closed
        os._exit(0)  # the parent is gone: also out of a function that never ends
