"""A jail for Python that a model wrote: killed when it takes too much of anything, and alone while it runs."""

from __future__ import annotations

import fcntl
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any

from conf.errors import GroveError
from rollout.jailer import FIRST_USER_OUTSIDE, NUM_USERS_OUTSIDE

JAILER = Path(__file__).with_name("jailer.py")
MIB = 2**20
REMOVE_LIMIT_S = 60.0
"""What removing a program's folder may take; what is left then lies in the temporary folder."""
GRACE_S = 10.0
"""Past the program's wall time, how long the jailer itself may take to start, to end it and to report."""
CHUNK_BYTES = 65_536
MAX_REPORT_BYTES = 65_536
ISOLATED_HINT = "Allow user namespaces on this machine, or run without isolation where you trust the programs."
PLAIN_HINT = "As root it runs as another user: Python must lie where every user may read it."
RUNS = count()
"""Numbers the runs of this process, so that two at a time have not the same user."""


class JailError(GroveError, RuntimeError):
    """The jail could not be built: nothing is known of the program."""


class Isolation(StrEnum):
    """How much of the machine a program may see."""

    required = "required"
    """Namespaces of its own, or it is not run."""
    preferred = "preferred"
    """Namespaces where the kernel lets us have them, else limits alone."""
    off = "off"
    """Limits alone."""


class Ended(StrEnum):
    """Why a program ended."""

    exited = "exited"
    """By itself: see `exit_code`."""
    signalled = "signalled"
    """By a signal that is none of ours, such as a segmentation fault."""
    wall_time = "wall_time"
    cpu_time = "cpu_time"
    memory = "memory"
    """All its processes together held more than it may have; one that asks for too much gets a MemoryError first."""
    output = "output"
    """It wrote more than is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use; the first that is exceeded ends it and all that it started."""

    wall_s: float = 10.0
    """Longest run."""
    cpu_s: float = 10.0
    """Processor time of each process, rounded up to whole seconds."""
    memory_mib: int = 512
    """Address space of each process, and resident memory of all together as seen every 20 ms."""
    disk_mib: int = 16
    """All its files together where it is isolated (they are held in memory), else each file."""
    max_processes: int = 16
    """Processes and threads at a time. Without isolation and without root, those of the same user count too."""
    output_bytes: int = 1_000_000
    """What is kept of each of its streams; one byte more and it is killed."""
    open_files: int = 64
    """File descriptors of each process."""
    nice: int = 10
    """How far it stands back for other processes, 0 to 19."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a program."""

    ended: Ended
    exit_code: int | None
    """None unless it exited."""
    signal: int | None
    """None unless a signal ended it."""
    stdout: str
    stderr: str
    reply: bytes
    """What it wrote to descriptor 4."""
    wall_s: float
    cpu_s: float
    """Processor seconds of the program and the processes it waited for; 0 where we killed it."""
    peak_mib: float
    """Its largest resident memory; 0 where we killed it."""
    network_cut: bool
    """True: it had no network at all. False: it had what we have."""

    @property
    def ok(self) -> bool:
        """True when it ended by itself with exit code 0."""
        return self.ended is Ended.exited and self.exit_code == 0


def run_python(
    code: str,
    *,
    stdin: str = "",
    limits: Limits | None = None,
    isolation: Isolation = Isolation.required,
    channel: bytes = b"",
) -> Outcome:
    """Run a program in a jail and wait for its end; blocks, and may be called from any thread.

    It runs with this Python's standard library and nothing else: no packages, no environment variables of ours, no
    descriptors but its own, no privileges to gain, and an empty folder that is gone afterwards.

    Isolated (Linux with user namespaces; containers often forbid them) it is alone: no network, not even its own; no
    process but its own to see or signal; of the file system only Python, the system's libraries and its folder, with no
    /proc, so that no environment and no memory of ours can be read; as root, a user of its own. When it ends, or we do,
    the kernel ends all that it started, however detached.

    Not isolated, the limits hold and descendants are hunted down, but the program can read every file that its user
    can. As root it gets a user of its own, which cannot signal us or read our /proc/PID/environ; without root it is our
    own user: **it can read our environment, kill us and use the network**, and nothing here prevents that. If the
    jailer itself is killed then, processes that detached themselves live on.

    Either way this is no virtual machine: the kernel is shared, no system calls are filtered, processor time is limited
    for each process and not for all together, and files without a name (memfd) count for `memory_mib` only as far as
    they are mapped.

    Args:
        code: the program.
        stdin: its standard input.
        limits: what it may use.
        isolation: whether it must be isolated.
        channel: what it can read from descriptor 3.
    Raises: JailError when the program could not be started as asked, which says nothing of the program.
    """
    limits = limits or Limits()
    isolated = isolation is Isolation.required or (isolation is Isolation.preferred and not isolation_problem())
    outcome = _run(code, stdin, limits, isolated, channel)
    if isinstance(outcome, str):
        raise JailError(
            f"the jail could not be built, so nothing is known of the program: {outcome}. {ISOLATED_HINT}"
            if isolated
            else f"the program could not be started, so nothing is known of it: {outcome}. {PLAIN_HINT}"
        )
    return outcome


@cache
def isolation_problem() -> str:
    """Why programs cannot be isolated on this machine; "" where they can. Tried once in each process."""
    outcome = _run("", "", Limits(), True, b"")
    return outcome if isinstance(outcome, str) else ""


def _run(code: str, stdin: str, limits: Limits, isolated: bool, channel: bytes) -> Outcome | str:
    folder = mkdtemp(prefix="grove-jail-")
    try:
        with _sealed(stdin.encode(errors="replace")) as stdin_fd, _sealed(channel) as channel_fd:
            return _guarded(code, stdin_fd, channel_fd, limits, isolated, folder)
    finally:
        # Not shutil.rmtree: a program can leave folders deeper than Python recurses.
        remove = ["rm", "-rf", "--one-file-system", folder]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(remove, check=False, stderr=subprocess.DEVNULL, timeout=REMOVE_LIMIT_S)


def _guarded(code: str, stdin_fd: int, channel_fd: int, limits: Limits, isolated: bool, folder: str) -> Outcome | str:
    reply_fd, tell_fd = os.pipe()
    report_fd, report_to_fd = os.pipe()
    request = _request(code, (channel_fd, tell_fd), limits, isolated, folder)
    with _sealed(json.dumps(request).encode()) as request_fd:
        passed = (request_fd, report_to_fd, channel_fd, tell_fd)
        try:
            process = subprocess.Popen(
                [_python(), "-I", "-S", "-B", str(JAILER), str(request_fd), str(report_to_fd)],
                stdin=stdin_fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                pass_fds=passed,
                start_new_session=True,
            )
        except OSError as error:
            os.close(reply_fd)
            os.close(report_fd)
            return str(error)
        finally:
            os.close(tell_fd)
            os.close(report_to_fd)
    assert process.stdout is not None and process.stderr is not None, "both are pipes"
    with process, os.fdopen(reply_fd, "rb") as reply, os.fdopen(report_fd, "rb") as report:
        streams = (process.stdout, process.stderr, reply, report)
        try:
            kept, flooded = _read(process, streams, limits)
        finally:
            process.kill()
    stdout, stderr, reply_bytes, told = kept
    try:
        report_told = json.loads(told)
    except ValueError:
        return f"the jailer ended without a report: {stderr.decode(errors='replace').strip()[-500:]}"
    if "broken" in report_told:
        return str(report_told["broken"])
    if report_told["reason"] == "told" and not flooded:
        return "something else ended the jailer"
    return _outcome(report_told, stdout, stderr, reply_bytes, flooded, limits, isolated)


def _read(process: subprocess.Popen[bytes], streams: Sequence[IO[bytes]], limits: Limits) -> tuple[list[bytes], bool]:
    """What each stream said up to its limit, and whether one said more; the report comes last and ends it."""
    kept = [bytearray() for _ in streams]
    rooms = [limits.output_bytes] * (len(streams) - 1) + [MAX_REPORT_BYTES]
    report, flooded = len(streams) - 1, False
    deadline = time.monotonic() + limits.wall_s + GRACE_S
    with selectors.DefaultSelector() as selector:
        for place, stream in enumerate(streams):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, place)
        ended = False
        while not ended and time.monotonic() < deadline:
            # The report ends last; what was said before it is read in the same round or a later one.
            for key, _ in sorted(selector.select(deadline - time.monotonic()), key=lambda each: each[0].data):
                place = key.data
                found = os.read(key.fd, CHUNK_BYTES)
                if not found:
                    selector.unregister(key.fileobj)
                    ended |= place == report
                if len(kept[place]) + len(found) > rooms[place] and not flooded:
                    flooded = True
                    process.send_signal(signal.SIGTERM)  # the jailer ends the program and reports
                kept[place] += found[: rooms[place] - len(kept[place])]
    for place, stream in enumerate(streams[:report]):
        with suppress(BlockingIOError):
            while found := os.read(stream.fileno(), CHUNK_BYTES):
                flooded |= len(kept[place]) + len(found) > rooms[place]
                kept[place] += found[: rooms[place] - len(kept[place])]
    return [bytes(each) for each in kept], flooded


def _outcome(
    told: dict[str, Any], stdout: bytes, stderr: bytes, reply: bytes, flooded: bool, limits: Limits, isolated: bool
) -> Outcome:
    status = told.get("status")
    exit_code = os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None
    signal_number = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
    cpu_s = told.get("cpu_s", 0.0)
    if flooded:
        ended = Ended.output
    elif told["reason"]:
        ended = Ended(told["reason"])
    elif signal_number == signal.SIGXCPU or (signal_number == signal.SIGKILL and cpu_s >= limits.cpu_s):
        ended = Ended.cpu_time
    else:
        ended = Ended.exited if signal_number is None else Ended.signalled
    return Outcome(
        ended=ended,
        exit_code=exit_code if ended is Ended.exited else None,
        signal=signal_number,
        stdout=stdout.decode(errors="replace"),
        stderr=stderr.decode(errors="replace"),
        reply=reply,
        wall_s=told["wall_s"],
        cpu_s=cpu_s,
        peak_mib=told.get("peak_bytes", 0) / MIB,
        network_cut=isolated,
    )


def _request(code: str, channel: tuple[int, int], limits: Limits, isolated: bool, folder: str) -> dict[str, Any]:
    is_root = os.geteuid() == 0
    cpu_s = max(math.ceil(limits.cpu_s), 1)
    # In a namespace of our own user the jailer and the warden count as well; outside of one, all our processes do.
    others = 0 if is_root else 2 if isolated else _num_own_threads()
    file_bytes, memory_bytes = limits.disk_mib * MIB, limits.memory_mib * MIB
    return {
        "parent": os.getpid(),
        "code": code.encode(errors="replace").decode(),
        "channel": channel,
        "folder": folder,
        "isolated": isolated,
        "user_outside": FIRST_USER_OUTSIDE + (os.getpid() + next(RUNS)) % NUM_USERS_OUTSIDE if is_root else None,
        "wall_s": limits.wall_s,
        "memory_bytes": memory_bytes,
        "disk_bytes": file_bytes,
        "nice": limits.nice,
        "python": [_python(), "-s", "-S", "-P", "-B"],
        "read_folders": sorted({str(Path(each).resolve()) for each in (sys.base_prefix, sys.base_exec_prefix)}),
        "environment": {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
            "PYTHONIOENCODING": "utf-8",
        },
        "rlimits": {
            "RLIMIT_CPU": (cpu_s, cpu_s + 1),
            "RLIMIT_AS": (memory_bytes, memory_bytes),
            "RLIMIT_FSIZE": (file_bytes, file_bytes),
            "RLIMIT_NPROC": (limits.max_processes + others, limits.max_processes + others),
            "RLIMIT_NOFILE": (limits.open_files, limits.open_files),
            "RLIMIT_CORE": (0, 0),
            "RLIMIT_MEMLOCK": (0, 0),
        },
    }


@cache
def _python() -> str:
    """The interpreter below a virtual environment, which alone knows no packages."""
    return str(Path(getattr(sys, "_base_executable", None) or sys.executable).resolve())


def _num_own_threads() -> int:
    """Threads of all processes of our user."""
    user, total = os.getuid(), 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if folder.stat().st_uid == user:
                total += sum(1 for _ in (folder / "task").iterdir())
    return total


@contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A descriptor to read `content` from, which nobody can change."""
    fd = os.memfd_create("grove-jail", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(fd), "wb") as target:
            target.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        yield fd
    finally:
        os.close(fd)
