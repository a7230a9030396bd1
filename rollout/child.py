"""What processes of a user's code have in common: no secrets, limits, output that is no flood, and one end for all that
they start."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress

logger = logging.getLogger(__name__)

SECRET_NAME = re.compile(r"^AWS_|(^|_)(API_?)?(KEY|TOKEN|SECRET|CREDENTIAL)S?(_|$)|PASSWORD|PASSWD", re.IGNORECASE)
"""Environment variables that a user's code does not see: a prompt or a log line would give them away."""
MIB = 2**20
READ_BYTES = 65_536


def secret_names(names: Iterable[str], passed: Collection[str]) -> list[str]:
    """Environment variables that look like secrets and are not passed on purpose."""
    return [name for name in names if SECRET_NAME.search(name) and name not in passed]


def set_limits(memory_mib: int, file_bytes: int = 0) -> None:
    """Limit this process and what it starts, each by itself.

    Args:
        memory_mib: data segment and private mappings, which is what is allocated and not what is merely mapped from
            files; 0 for no limit.
        file_bytes: size of any file it writes; 0 for no limit.
    """
    if memory_mib:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_mib * MIB, memory_mib * MIB))
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # SIGALRM's default action is the kernel's own: it ends even a process that hangs in C code and has lost its parent.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def kill_group(pid: int) -> None:
    """Kill the group that a process leads, all that it started included; the process itself is still to be reaped."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class Output:
    """Lets what a process prints through to our own stderr, but no flood, which would fill the disk with a log.

    Args:
        who: prints, for the log.
        max_bytes: kept between two calls of `renew`; the rest is dropped.
    """

    def __init__(self, who: str, max_bytes: int) -> None:
        self._who, self._max_bytes, self._left = who, max_bytes, max_bytes

    def renew(self) -> None:
        """The process may print as much again."""
        self._left = self._max_bytes

    def copy(self, fd: int) -> None:
        """Copy until the other end is closed."""
        is_flood = False
        with suppress(OSError, ValueError):
            while data := os.read(fd, READ_BYTES):
                kept, self._left = data[: self._left], max(0, self._left - len(data))
                if kept:
                    is_flood = False
                    sys.stderr.write(kept.decode(errors="replace"))
                    sys.stderr.flush()
                elif not is_flood:
                    is_flood = True
                    logger.warning("%s printed more than %d bytes at a time; dropped", self._who, self._max_bytes)
