"""Rules about sweeps: numbers that cannot be, and settings that a single run would never read."""

from __future__ import annotations

from collections.abc import Callable

from conf.problem import Problem
from conf.schema import Config, SweepConfig

AT_LEAST = {"parallel": 1, "num_trials": 1, "num_checks": 1, "max_retries": 0, "startup_trials": 0}
SECONDS = ("max_silent_s", "stop_timeout_s")


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [a_single_run_sweeps_nothing]


def a_single_run_sweeps_nothing(cfg: Config) -> list[Problem]:
    """Settings of a sweep are read by `grove train -m` and taken out of its members."""
    if cfg.sweep == SweepConfig():
        return []
    return [
        Problem(
            "sweep settings change nothing in a single run: they are read by `grove train -m`, which trains one run "
            "for each combination of values.",
            fatal=False,
        )
    ]


def sweep_problems(settings: SweepConfig) -> list[Problem]:
    """What is wrong with the settings of a sweep, whatever it varies."""
    found = [
        Problem(f"sweep.{name}={getattr(settings, name)} cannot be: it must be {least} or more.")
        for name, least in AT_LEAST.items()
        if getattr(settings, name) < least
    ]
    return found + [
        Problem(f"sweep.{name}={getattr(settings, name)} cannot be: give seconds, above 0.")
        for name in SECONDS
        if not getattr(settings, name) > 0
    ]
