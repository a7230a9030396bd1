"""Environment variables on their way from the launcher to every process of a Ray job, without touching a disk.

Ray's own way, `runtime_env={"env_vars": ...}`, writes their values into a log on every node. Here they lie in the
memory of the cluster's head while the run lasts, under a name that nobody can guess and that alone is passed on in the
open: the driver takes them from there, and so does each worker process before it runs anything else.

A head that is set up to keep its state in Redis keeps these there too.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from typing import Any

from conf.errors import LaunchError

NAME_VARIABLE = "GROVE_PASSED"
"""Environment variable that holds the name."""
HOOK = "rl.jobs.passed.take_in_worker"


def new_name() -> str:
    """A name for a parcel of variables; 256 bits, and an ending that the job server takes."""
    return f"grove_{secrets.token_hex(32)}.zip"


def to_bytes(environment: Mapping[str, str]) -> bytes:
    """The parcel."""
    return json.dumps(dict(environment)).encode()


def take_passed() -> None:
    """In the driver, before anything else: the variables that the launcher passed become its own."""
    name = os.environ.get(NAME_VARIABLE)
    if name:
        _take(_head(), name)


def take_in_worker() -> None:
    """In a worker process, as Ray's setup hook."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    _take(internal_kv_get_gcs_client(), os.environ[NAME_VARIABLE])


def forget_passed() -> None:
    """At the end of the driver: take the parcel out of the head's memory."""
    name = os.environ.get(NAME_VARIABLE)
    if name:
        _head().internal_kv_del(_key(name), False, None)


def _take(head: Any, name: str) -> None:
    parcel = head.internal_kv_get(_key(name), None)
    if parcel is None:
        raise LaunchError(
            f"the environment variables that this job was launched with are no longer in the memory of the cluster's "
            f"head ({NAME_VARIABLE} names {name[:14]}...): it was restarted, or the job was. Launch the run again."
        )
    os.environ.update(json.loads(parcel))


def _head() -> Any:
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)

    return GcsClient(address=os.environ["RAY_ADDRESS"])


def _key(name: str) -> bytes:
    return f"gcs://{name}".encode()
