"""What every process of a run does first."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

COLLECT_AFTER = (50_000, 20, 20)
"""Objects made since the last collection, and collections of a generation, until the next. Python's own (700, 10, 10)
looks at a library's objects again and again while it is imported: a sixth of the time of vLLM's import."""


def collect_seldom() -> None:
    """Let Python look for unreachable cycles less often."""
    gc.set_threshold(*COLLECT_AFTER)


def begin_actor(log: Path) -> None:
    """An actor's first words: its standard output and error, and those of the processes it starts, go to a file."""
    collect_seldom()
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def engine_environment(*, on_gpu: bool = False) -> dict[str, str]:
    """Environment variables of a process that serves a model; vLLM reads them when it is imported."""
    everywhere = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # The driver has resolved the model to a folder.
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on_gpu:  # where vLLM has its own processes, compiler and threads
        return everywhere
    return everywhere | {
        # Spinning OpenMP threads of two engines on two cores cost a factor of 20.
        "OMP_NUM_THREADS": "1",
        # The executor then lives in the engine's process: one process less for each worker.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The compiler would be run for one tiny function at the first request (9 s).
        "TORCH_COMPILE_DISABLE": "1",
    }
