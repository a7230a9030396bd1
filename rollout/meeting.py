"""Where processes that share no parent meet: a small store at one address, which one of them opens."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import psutil
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

LOOPBACK = "127.0.0.1"
GIVEN_UP = "given up"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0001, 0.002
CONNECT_LIMIT_S = 10.0
"""Longest wait for a store that was there before anybody was told of it."""


def open_meeting(timeout_s: float, host: str = LOOPBACK) -> TCPStore:
    """Where others meet this process: it opens it, keeps it, and tells `meeting_address`.

    It listens on one address alone and on a port that the system picked, so that nobody else takes it first.

    Args:
        host: an address of this node that the others reach; the loopback address where all are on one machine.
    """
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listening.detach(),
    )


def meeting_address(meeting: TCPStore) -> str:
    """What the others give to `meeting_at`."""
    return f"{meeting.host}:{meeting.port}"


def meeting_at(address: str, timeout_s: float) -> TCPStore:
    """The store that another process opened.

    Raises: torch.distributed.DistError when it does not answer in time.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)


def give_up(address: str, why: str) -> None:
    """Have whoever waits in `until` at this address wait no longer, since somebody is gone.

    Raises: torch.distributed.DistError when it does not answer.
    """
    meeting_at(address, CONNECT_LIMIT_S).set(GIVEN_UP, why)


def until_all(store: Store, what: str, num: int, limit_s: float) -> list[str]:
    """Wait until all of `num` processes have said something; returns the keys under which they did.

    Args:
        what: the keys are `what`/0, `what`/1 ...
    Raises: RuntimeError when not all did in time, or somebody gave it up.
    """
    keys = [f"{what}/{number}" for number in range(num)]

    def silent() -> str:
        return f"{sum(not store.check([key]) for key in keys)} of {num} processes said nothing"

    until(store, lambda: store.check(keys), silent, limit_s)
    return keys


def until(store: Store, done: Callable[[], bool], undone: Callable[[], str], limit_s: float) -> None:
    """Wait until it is done.

    Args:
        undone: what to say when it is not done in time.
    Raises: RuntimeError when it was not done in time, or somebody gave it up.
    """
    deadline, pause_s = time.monotonic() + limit_s, FIRST_PAUSE_S
    while not done():
        if store.check([GIVEN_UP]):
            raise RuntimeError(store.get(GIVEN_UP).decode())
        if time.monotonic() > deadline:
            raise RuntimeError(f"{undone()} for {limit_s:g} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def interface_of(host: str) -> str | None:
    """The network interface whose network an address of this node belongs to; None where none does."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family is socket.AF_INET and each.netmask:
                network = ipaddress.ip_network(f"{each.address}/{each.netmask}", strict=False)
                if ipaddress.ip_address(host) in network:
                    return name
    return None
