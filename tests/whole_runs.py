"""What tests of whole runs share: one warm-started tiny policy, made by the first that needs it; and what two
runs are compared by."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

FOLDER_VARIABLE = "GROVE_TEST_WARM_STARTS"
if FOLDER_VARIABLE not in os.environ:
    os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="grove-warm-starts-")
    atexit.register(shutil.rmtree, os.environ[FOLDER_VARIABLE], ignore_errors=True)
WARM_STARTS = Path(os.environ[FOLDER_VARIABLE])
"""Where warm-started policies are kept for the tests of this process and of those that it starts."""

WARM_START = [
    *("model.warm_start.num_steps=60", "model.warm_start.num_threads=1"),
    f"model.warm_start.cache_dir={WARM_STARTS}",
]
"""Settings of a policy that is just good enough to learn from."""


def steady_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics so far, without what the clock and the machine decide."""
    if not (folder / "metrics.jsonl").exists():
        return []
    from rl.metrics import read_metrics

    rows = read_metrics(folder / "metrics.jsonl")
    timed = ("time/", "seconds", "per_second", "cached")
    return [{name: value for name, value in row.items() if not any(word in name for word in timed)} for row in rows]
