"""A trace of what the learner computes in one step, for Perfetto or chrome://tracing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

PROFILES = "profile"
"""Folder of traces in a run folder."""


@contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Trace every operator in the block, on CPU and GPU, into `path` (Chrome trace JSON, gzipped); None traces nothing.

    A disk that takes no trace is logged: a trace is never worth a run.
    """
    if path is None:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as found:
        yield
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        logger.warning("the trace %s could not be written: %s", path, error)
