"""What tests of whole runs share: one warm-started tiny policy, made by the first that needs it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

WARM_STARTS = Path(tempfile.mkdtemp(prefix="grove-warm-starts-"))
"""Where warm-started policies are kept for the tests of this process."""
atexit.register(shutil.rmtree, WARM_STARTS, ignore_errors=True)

WARM_START = [
    *("model.warm_start.num_steps=60", "model.warm_start.num_threads=1"),
    f"model.warm_start.cache_dir={WARM_STARTS}",
]
"""Settings of a policy that is just good enough to learn from."""
