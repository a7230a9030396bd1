"""Tells at the end of a run which of the settings that were changed did nothing in it."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from conf.reads import excused, read_keys, unread, watched
from conf.schema import Config

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def told_if_unread(cfg: Config) -> Iterator[Config]:
    """The same settings, watched; those that no part of a run read are told when the run has come to its end.

    Parts on other machines cannot note what they read, so nothing is told of a run on a cluster.
    """
    if cfg.cluster.address:
        yield cfg
        return
    with tempfile.TemporaryDirectory(prefix="grove-reads-") as folder:
        yield watched(cfg, Path(folder))
        found = unread(cfg, read_keys(Path(folder)), excused(cfg))
    if found:
        settings = ", ".join(f"{key}={value}" for key, value in found.items())
        logger.warning(
            "nothing in this run read %s: it changed nothing. `grove check` says this before a run.", settings
        )
