"""Whether the suite as a whole reads every setting: what `tests/conftest.py` asks at the end of a session."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from conf.check_machine import num_gpus
from conf.keys import all_keys
from conf.reads import pattern_of, read_keys, record_field

NEEDS_A_GPU = ("rewards.models.<name>.gpu_memory_share",)
"""Settings that are read on a GPU alone."""
PACKAGES = ("vllm", "textworld", "reasoning_gym", "verifiers", "mcp")
"""Packages without which tests are skipped."""


def missing_keys(folder: Path) -> list[str]:
    """Patterns of the settings that no test has read, as noted in a folder."""
    noted = read_keys(folder)
    read = {pattern_of(key) for key in noted if ":" not in key}
    expected = [key.name for key in all_keys() if num_gpus() or key.name not in NEEDS_A_GPU]
    return [key for key in expected if key not in read and record_field(key) not in noted]


def is_whole_suite(options: argparse.Namespace) -> bool:
    """Whether pytest was asked for all tests, and none of them is skipped for lack of a package."""
    asked = [Path(each).name for each in options.file_or_dir]
    choices = ("markexpr", "keyword", "collectonly", "lf", "maxfail", "deselect")
    picks = [getattr(options, name, None) for name in choices]
    everything_installed = all(importlib.util.find_spec(name) is not None for name in PACKAGES)
    return asked in ([], ["tests"]) and not any(picks) and everything_installed
