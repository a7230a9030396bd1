"""Functions in processes of their own, one call at a time: what hangs or crashes is killed and costs its own call."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any

from conf.errors import ToolError
from conf.plugin import load_object
from rollout.child import Output, kill_group, secret_names, set_limits

START_TIMEOUT_S = 120.0
"""Longest a process may take to start and to import the function."""
ORPHAN_GRACE_S = 5.0
"""Past a call's limit by so much, a process ends itself: then nobody is left to kill it."""
MAX_RESULT_BYTES = 2**20
MAX_FILE_BYTES = 256 * 2**20
"""Size of any file it writes."""
MAX_OUTPUT_BYTES = 64 * 1024
"""Of what one call prints."""


class CallFailed(Exception):
    """A call came to nothing by the fault of its process: it raised, hung, died or said too much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a process may have."""

    memory_mib: int = 0
    """Allocated memory; 0 for no limit."""
    pass_env: tuple[str, ...] = ()
    """Environment variables it sees although their names look like secrets."""


class Apart:
    """Processes that call functions for us, up to `num` at a time; started when they are first needed.

    They see no environment variable that looks like a secret, and each call begins in an empty folder that is thrown
    away behind it. They are no jail (`rollout.jail` is one): they are our own user, with its files and its network.
    """

    def __init__(self, num: int, bounds: Bounds) -> None:
        self._bounds = bounds
        self._slots = threading.BoundedSemaphore(num)
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._lock = threading.Lock()
        weakref.finalize(self, _kill_all, self._all)

    def call(self, spec: str, arguments: Mapping[str, Any], timeout_s: float) -> str:
        """Call a function and wait; blocks, also until a process is free, and may be called from any thread.

        Args:
            spec: what `conf.plugin.load_object` reads; files by their full path.
            arguments: by parameter name; whatever pickle can send.
            timeout_s: longest the function itself may take.
        Returns: text as it is, anything else as JSON.
        Raises: ToolError as the function raised it; CallFailed.
        """
        with self._slots:
            process = self._free()
            try:
                kind, text = process.call(spec, arguments, timeout_s)
            except BaseException:
                self._all.discard(process)
                process.kill()
                raise
            with self._lock:
                self._idle.append(process)
        if kind == "refused":
            raise ToolError(text)
        if kind == "failed":
            raise CallFailed(text)
        return text

    def close(self) -> None:
        """End every process."""
        _kill_all(self._all)
        with self._lock:
            self._idle.clear()

    def _free(self) -> _Process:
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                process = _Process(self._bounds)
                self._all.add(process)
                return process
            if process.is_running:
                return process
            self._all.discard(process)
            process.kill()


def _kill_all(processes: set[_Process]) -> None:
    while processes:
        processes.pop().kill()


@dataclass(slots=True, eq=False)
class _Process:
    bounds: Bounds
    _pipe: Connection = field(init=False)
    _popen: subprocess.Popen[bytes] = field(init=False)
    _folder: str = field(init=False)
    _output: Output = field(init=False)

    def __post_init__(self) -> None:
        self._folder = mkdtemp(prefix="grove-tool-")
        self._output = Output("a tool", MAX_OUTPUT_BYTES)
        self._pipe, theirs = Pipe()
        hidden = set(secret_names(os.environ, self.bounds.pass_env))
        request = {"fd": theirs.fileno(), "folder": self._folder, "memory_mib": self.bounds.memory_mib}
        code = (
            f"import sys; sys.path[:] = {[each or str(Path.cwd()) for each in sys.path]!r}; "
            f"from rollout.apart import serve; serve(**{request!r})"
        )
        try:
            # Not multiprocessing: its children keep our whole environment in their /proc/PID/environ.
            self._popen = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if name not in hidden}
                | {"TMPDIR": self._folder},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            self._pipe.close()
            raise CallFailed(f"its process could not be started: {error}") from error
        finally:
            theirs.close()
        assert self._popen.stdout is not None, "it is a pipe"
        threading.Thread(target=self._copy_output, args=(self._popen.stdout,), name="tool output", daemon=True).start()

    @property
    def is_running(self) -> bool:
        """Whether it can be called."""
        return self._popen.poll() is None

    def call(self, spec: str, arguments: Mapping[str, Any], timeout_s: float) -> tuple[str, str]:
        """How the call ended, and what it said. Raises: CallFailed; whatever pickle raises."""
        message = pickle.dumps((spec, dict(arguments), timeout_s))
        self._output.renew()
        try:
            self._pipe.send_bytes(message)
            kind, text = self._heard(START_TIMEOUT_S, f"was not ready within {START_TIMEOUT_S:g} s")
            if kind == "ready":
                kind, text = self._heard(timeout_s, f"did not return within {timeout_s:g} s")
        except (EOFError, OSError, ValueError) as error:  # ValueError: what it sent is no answer
            raise CallFailed(f"its process {self._fate(error)}") from None
        return kind, text

    def _heard(self, timeout_s: float, why_not: str) -> tuple[str, str]:
        if not self._pipe.poll(timeout_s):
            raise CallFailed(why_not)
        kind, text = json.loads(self._pipe.recv_bytes(2 * MAX_RESULT_BYTES))
        return kind, text

    def _fate(self, error: Exception) -> str:
        try:
            code = self._popen.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return f"sent what cannot be read ({error})"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """End it and all that it started."""
        kill_group(self._popen.pid)
        self._popen.wait()
        self._pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _copy_output(self, output: IO[bytes]) -> None:
        with output:
            self._output.copy(output.fileno())


def serve(fd: int, folder: str, memory_mib: int) -> None:
    """What such a process does: call what it is told to until its parent is gone."""
    pipe = Connection(fd)
    set_limits(memory_mib, MAX_FILE_BYTES)
    started_in = Path.cwd()
    try:
        while True:
            spec, arguments, timeout_s = pickle.loads(pipe.recv_bytes())  # our own parent wrote it
            place = mkdtemp(dir=folder)
            answer = _answer(pipe, spec, arguments, timeout_s, place)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.chdir(started_in)
            shutil.rmtree(place, ignore_errors=True)
            pipe.send_bytes(json.dumps(answer).encode())
    except (EOFError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # a thread of the user's code must not keep the process


def _answer(pipe: Connection, spec: str, arguments: dict[str, Any], timeout_s: float, place: str) -> tuple[str, str]:
    try:
        function = load_object(spec, key="task.tools")
        os.chdir(place)  # behind the import, which may read files beside the start folder
        pipe.send_bytes(json.dumps(("ready", "")).encode())
        signal.setitimer(signal.ITIMER_REAL, timeout_s + ORPHAN_GRACE_S)
        is_async = inspect.iscoroutinefunction(function)
        result = asyncio.run(function(**arguments)) if is_async else function(**arguments)
        text = as_text(result)
    except ToolError as error:
        return "refused", str(error)
    except BaseException as error:  # also sys.exit and KeyboardInterrupt of the user's code: an answer is owed
        return "failed", f"raised {type(error).__name__}: {error}"[:MAX_OUTPUT_BYTES]
    size = len(text.encode(errors="replace"))
    if size > MAX_RESULT_BYTES:
        return "failed", f"returned {size} bytes, {MAX_RESULT_BYTES} is the most"
    return "returned", text


def as_text(result: Any) -> str:
    """A tool's result as it is told."""
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
