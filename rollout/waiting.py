"""Waiting for Ray with a limit, and saying what is awaited."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from conf.errors import GroveError
from rollout.patience import wait_for


def wait_some(refs: Sequence[ray.ObjectRef[Any]], *, limit_s: float, what: str) -> list[ray.ObjectRef[Any]]:
    """The refs that are ready, at least one.

    Args:
        limit_s: longest wait, in seconds.
        what: what is awaited, for the log and the error.
    Raises: WaitTimeout when none came in time.
    """

    def come(wait_s: float) -> list[ray.ObjectRef[Any]] | None:
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=wait_s)
        return ready or None

    return wait_for(come, limit_s=limit_s, what=what)


def wait_all(refs: Sequence[ray.ObjectRef[Any]], *, limit_s: float, what: str) -> list[Any]:
    """Values of all refs, in order. Raises WaitTimeout, and whatever a call raised."""
    started = time.monotonic()
    waiting = list(refs)
    while waiting:
        left_s = max(0.1, limit_s - (time.monotonic() - started))
        ready = wait_some(waiting, limit_s=left_s, what=f"{what} ({len(waiting)} of {len(refs)} left)")
        for ref in ready:
            value_of(ref)
        waiting = [ref for ref in waiting if ref not in ready]
    return [value_of(ref) for ref in refs]


def value_of(ref: ray.ObjectRef[Any]) -> Any:
    """Value of a ref that is ready.

    Raises: what the call raised; one of Grove's own errors as it was raised, without Ray's account of where, since its
    message is written for the user.
    """
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, GroveError):
            raise error.cause from error
        raise
