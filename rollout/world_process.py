"""Worlds in processes of their own: one that hangs or crashes is killed, and other sessions in it are made again.

Run as `python -m rollout.world_process MIB` it is such a process, of so much memory: pickled requests come in by a pipe
and answers go out by another. It ends when its pipe does, so none outlives the one who started it.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import IO, Any

from conf.errors import ConfigError, DataError, GroveError
from rollout.child import kill_group, secret_names, set_limits
from rollout.tools import idle_thread, run_in_thread
from rollout.types import Prompt
from rollout.world import Observed, SessionLost, Sessions, WorldFailed, load_world

SIZE = struct.Struct("!Q")
START_TIMEOUT_S = 120.0
"""Longest a process may take to import its world, on top of the first call's own limit."""
PASSED_ON: dict[str, type[GroveError]] = {each.__name__: each for each in (ConfigError, DataError, SessionLost)}
"""Errors that keep their class on the way; all others are the world's failure."""


class _Process:
    """One process with sessions in it, started at its first call and again after it was killed."""

    def __init__(self, fn: str, args: Mapping[str, Any], pass_env: Collection[str], memory_mib: int) -> None:
        self._fn, self._args, self._pass_env, self._memory_mib = fn, dict(args), pass_env, memory_mib
        self._lock = threading.RLock()
        self._popen: subprocess.Popen[bytes] | None = None
        self.num_starts = 0

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._popen.pid if self._popen is not None and self._popen.poll() is None else None

    def call(self, name: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """One request and its answer; the limit starts when those before it are done.

        Raises: WorldFailed when it raised, hung or died; ConfigError, DataError, SessionLost as they were raised.
        """
        with self._lock:
            if self.pid is None:
                self._start()
            kind, answer = self._asked(name, arguments, timeout_s)
        if kind == "returned":
            return answer
        if kind in PASSED_ON:
            raise PASSED_ON[kind](answer)
        raise WorldFailed(answer)

    def close(self, key: int) -> None:
        """Close a session, if the process that holds it still runs."""
        with suppress(GroveError), self._lock:
            if self.pid is not None:
                self._asked("close", (key,), START_TIMEOUT_S)

    def kill(self) -> None:
        """End the process and all its sessions; a call on its way fails."""
        popen = self._popen
        if popen is not None:
            kill_group(popen.pid)
            with self._lock:
                self._clear()

    def _clear(self) -> None:
        popen, self._popen = self._popen, None
        if popen is not None:
            kill_group(popen.pid)
            popen.wait()
            for pipe in (popen.stdin, popen.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def _start(self) -> None:
        self._clear()
        self.num_starts += 1
        hidden = secret_names(os.environ, self._pass_env)
        seen = {name: value for name, value in os.environ.items() if name not in hidden}
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "rollout.world_process", str(self._memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # one group with whatever the world starts
            env={**seen, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
        )
        kind, answer = self._asked("load", (self._fn, self._args), START_TIMEOUT_S)
        if kind != "returned":
            self._clear()
            raise PASSED_ON.get(kind, WorldFailed)(answer)

    def _asked(self, name: str, arguments: tuple[Any, ...], timeout_s: float) -> tuple[str, Any]:
        popen = self._popen
        assert popen is not None and popen.stdin is not None and popen.stdout is not None
        deadline = time.monotonic() + timeout_s
        try:
            _write(popen.stdin, (name, arguments))
            return _read(popen.stdout.fileno(), deadline)
        except (EOFError, OSError) as error:
            why = f"did not answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else _fate(popen)
            self._clear()
            raise WorldFailed(f"the world {why}; the process was replaced") from None


class ProcessHost:
    """Implements `rollout.world.Host`: sessions are dealt out to `num` processes, each doing one thing at a time."""

    def __init__(
        self, fn: str, args: Mapping[str, Any], num: int, pass_env: Collection[str] = (), memory_mib: int = 0
    ) -> None:
        """Start no process yet.

        Args:
            fn: `task.world.fn`.
            args: `task.world.args`.
            num: processes.
            pass_env: environment variables that the world sees although their names look like secrets.
            memory_mib: that each may allocate; 0 for no limit.
        """
        self.processes = [_Process(fn, args, pass_env, memory_mib) for _ in range(num)]
        self._number = 0

    def new_key(self, like: int | None = None) -> int:
        """Keys of one process are equal modulo the number of processes."""
        num = len(self.processes)
        self._number += 1
        return self._number * num + (self._number if like is None else like) % num

    async def start(self, key: int, prompt: Prompt, timeout_s: float) -> str:
        """As `Sessions.start`."""
        return await self._call("start", key, (key, prompt), timeout_s)

    async def act(self, key: int, action: str, timeout_s: float) -> Observed:
        """As `Sessions.act`."""
        return await self._call("act", key, (key, action), timeout_s)

    async def copy(self, key: int, new_key: int, timeout_s: float) -> None:
        """As `Sessions.copy`."""
        await self._call("copy", key, (key, new_key), timeout_s)

    def close(self, key: int) -> None:
        """Close in a thread, behind the requests that are on their way."""
        idle_thread().make(partial(self._process(key).close, key))

    def kill(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()

    def __del__(self) -> None:
        self.kill()

    def _process(self, key: int) -> _Process:
        return self.processes[key % len(self.processes)]

    async def _call(self, name: str, key: int, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        # The call keeps its own limit, which starts when the process is free; it always returns.
        call = partial(self._process(key).call, name, arguments, timeout_s)
        return await run_in_thread(call, {}, None)  # type: ignore[arg-type]


def _fate(popen: subprocess.Popen[bytes]) -> str:
    """What became of a process that closed its pipe; it may hang all the same."""
    try:
        return f"ended its process (status {popen.wait(timeout=1.0)})"
    except subprocess.TimeoutExpired:
        return "closed its pipe"


def _write(pipe: IO[bytes], message: Any) -> None:
    body = pickle.dumps(message)
    rest = memoryview(SIZE.pack(len(body)) + body)
    while rest:
        rest = rest[pipe.write(rest) or 0 :]


def _read(fd: int, deadline: float | None) -> Any:
    (size,) = SIZE.unpack(_read_bytes(fd, SIZE.size, deadline))
    return pickle.loads(_read_bytes(fd, size, deadline))


def _read_bytes(fd: int, size: int, deadline: float | None) -> bytes:
    parts = b""
    while len(parts) < size:
        if deadline is not None and not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(fd, size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


def _end_with_parent() -> None:
    parent = os.getppid()
    while os.getppid() == parent:  # a world that hangs does not read the pipe, and would stay behind
        time.sleep(1.0)
    os._exit(1)


def _serve(memory_mib: int) -> None:
    set_limits(memory_mib)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    requests, answers = os.dup(0), os.fdopen(os.dup(1), "wb", buffering=0)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what a world prints must not get between the answers
    sessions: Sessions | None = None
    while True:
        try:
            name, arguments = _read(requests, None)
        except EOFError:
            return
        try:
            if name == "load":
                sessions, result = Sessions(load_world(*arguments)), None
            else:
                result = getattr(sessions, name)(*arguments)
            answer = pickle.dumps(("returned", result))
        except Exception as error:
            kind = type(error).__name__
            text = str(error) if kind in PASSED_ON else f"the world raised {kind}: {error}"
            answer = pickle.dumps((kind, text))
        answers.write(SIZE.pack(len(answer)) + answer)


if __name__ == "__main__":
    from rollout.world_process import _serve as serve  # so that errors have the class their sender knows

    serve(int(sys.argv[1]))
